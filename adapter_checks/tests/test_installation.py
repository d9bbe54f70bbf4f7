"""The wheel does its job in an environment of its own, where nothing of the checkout can be imported."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import adapter_checks

PROJECT = Path(__file__).resolve().parent.parent

# What a person does: a base, an adapter trained on it, a merge, and the check; then the same with a merge that went wrong.
SCRIPT = """
    import json, sys, torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from peft import LoraConfig, PeftModel, get_peft_model
    import adapter_checks
    from adapter_checks import check_merged_folder

    try:
        import course_utils
        raise SystemExit("course_utils can be imported here, so this proves nothing")
    except ModuleNotFoundError:
        pass
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    LlamaForCausalLM(LlamaConfig(initializer_range=0.3, **sizes)).save_pretrained("base")
    load = lambda: LlamaForCausalLM.from_pretrained("base")
    model = get_peft_model(load(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained("adapter")
    PeftModel.from_pretrained(load(), "adapter").merge_and_unload().save_pretrained("merged")
    load().save_pretrained("not merged")
    found = {folder: check_merged_folder("base", "adapter", folder).codes for folder in ("merged", "not merged")}
    print(json.dumps({"file": adapter_checks.__file__, "version": adapter_checks.__version__, "found": found}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools writes beside what it builds.
    source = shutil.copytree(
        PROJECT, folder / "source", ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__")
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        folder,
        source,
    ]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Python of a new environment with the wheel and, beside it, the libraries that are installed here.

    A folder named in a .pth file is searched, but its own .pth files are not read: what is installed here in editable mode
    isn't there.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel]
    subprocess.run([str(part) for part in install], check=True, capture_output=True, text=True)
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture
def run(environment, tmp_path):
    def run(*command):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COURSE"))}
        return subprocess.run([str(part) for part in command], cwd=tmp_path, env=clean, capture_output=True, text=True)

    return run


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        text = "".join(archive.read(name).decode() for name in names if name.endswith((".py", "METADATA")))
    assert f"\nVersion: {adapter_checks.__version__}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "adapter_checks/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)
    assert not [
        name
        for name in names
        if not name.startswith(("adapter_checks/", f"adapter_checks-{adapter_checks.__version__}"))
    ]
    for word in ("course", "lesson", "learner", "notebook that"):
        assert word not in text.lower().replace("of course", ""), f"{word!r} is of the course"


def test_the_wheel_checks_a_merge_elsewhere(run, environment, tmp_path):
    import textwrap

    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    outcome = run(environment, "script.py")
    assert outcome.returncode == 0, outcome.stderr
    found = json.loads(outcome.stdout.splitlines()[-1])
    assert (
        Path(found["file"]).is_relative_to(environment.parent.parent) and found["version"] == adapter_checks.__version__
    )
    assert found["found"]["merged"] == [] and "not_merged" in found["found"]["not merged"]

    script = environment.with_name("adapter-checks" + environment.suffix)
    healthy = run(script, "merged", "base", "adapter", "merged", "--json")
    assert healthy.returncode == 0 and json.loads(healthy.stdout)["ok"], healthy.stderr
    faulty = run(environment, "-m", "adapter_checks", "merged", "base", "adapter", "not merged")
    assert faulty.returncode == 1 and "[FAIL]" in faulty.stdout, faulty.stderr
