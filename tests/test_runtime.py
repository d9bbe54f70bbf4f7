"""Places, machine, settings, progress and saving."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapter_checks.errors import InputError
from course_utils import runtime

ROOT = Path(__file__).resolve().parent.parent


def run_python(code, *, cwd=None, **environment):
    """Run code in a fresh interpreter; a variable given as None is taken out of the environment."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


# ---------------------------------------------------------------------------------------------- import


def test_import_is_quick_and_brings_no_heavy_library():
    done = run_python(
        """
        import sys, time
        start = time.process_time()  # of this process alone: other work on the machine must not fail the test
        import course_utils
        taken = time.process_time() - start
        from course_utils import data, evaluation, plotting, runtime
        heavy = {"torch", "transformers", "peft", "datasets", "matplotlib", "numpy"} & set(sys.modules)
        print(taken, *heavy)
        """
    )
    taken, *heavy = done.stdout.split()
    assert heavy == []
    assert float(taken) < 0.2


def test_package_names_its_submodules_and_nothing_else():
    import course_utils

    assert course_utils.data.TASKS and "runtime" in dir(course_utils)
    with pytest.raises(AttributeError, match="nothing"):
        course_utils.nothing  # noqa: B018 (reading it is what fails)


# ---------------------------------------------------------------------------------------------- places


def test_places_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    before = runtime.project_root(), runtime.models_dir(), runtime.data_dir()
    monkeypatch.chdir(tmp_path)
    assert (runtime.project_root(), runtime.models_dir(), runtime.data_dir()) == before
    assert before == (ROOT, ROOT / "models", ROOT / "data")


def test_runs_dir_is_in_the_checkout_unless_named(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "project_root", lambda: tmp_path)
    monkeypatch.delenv("COURSE_RUNS")
    assert runtime.runs_dir() == tmp_path / "runs" and (tmp_path / "runs").is_dir()
    elsewhere = tmp_path / "Ergebnisse für später" / "é"
    monkeypatch.setenv("COURSE_RUNS", str(elsewhere))
    assert runtime.runs_dir() == elsewhere and elsewhere.is_dir()


@pytest.fixture
def unwritable_checkout(tmp_path, monkeypatch):
    """A place below a plain file: there even root, whom no permission stops, can't make a folder."""
    file = tmp_path / "checkout"
    file.write_text("a file where the checkout should be")
    monkeypatch.setattr(runtime, "project_root", lambda: file)
    monkeypatch.delenv("COURSE_RUNS")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(runtime.tempfile, "gettempdir", lambda: str(temporary))
    monkeypatch.setattr(runtime, "_told_fallback", set())
    return file


def test_read_only_checkout_falls_back_and_says_so_once(unwritable_checkout, capsys):
    folder = runtime.runs_dir()
    assert folder.is_dir() and folder.is_relative_to(runtime.tempfile.gettempdir())
    assert runtime.runs_dir() == folder
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and str(folder) in said[0] and "COURSE_RUNS" in said[0]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has a temporary folder for each user")
def test_fallback_is_private_and_refuses_a_folder_put_there_by_somebody_else(unwritable_checkout, monkeypatch):
    folder = runtime.runs_dir()
    assert folder.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(runtime.os, "getuid", lambda owner=os.getuid(): owner)
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    with pytest.raises(InputError, match="belongs to another user"):
        runtime.runs_dir()


def test_a_read_only_mount_is_noticed_although_permissions_allow_writing(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    monkeypatch.setattr(runtime.tempfile, "TemporaryFile", refuse)
    assert os.access(tmp_path, os.W_OK)
    with pytest.raises(InputError, match="Read-only file system"):
        runtime.runs_dir()


def test_course_runs_that_can_not_be_made_is_an_error_not_a_fallback(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "file" / "runs"))
    with pytest.raises(InputError, match="COURSE_RUNS names .*can't be written to"):
        runtime.runs_dir()


# ---------------------------------------------------------------------------------------------- base model


def test_base_model_given_as_a_folder_in_a_place_with_spaces_and_accents(tiny_model_folder, tmp_path, monkeypatch):
    place = tmp_path / "Modèles de cours" / "käse 1"
    shutil.copytree(tiny_model_folder, place)
    monkeypatch.chdir(place.parent)
    monkeypatch.setenv("COURSE_BASE_MODEL", "käse 1")
    assert runtime.base_model() == str(place)  # absolute: it holds when the working directory changes
    assert not runtime.is_shipped_base()
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(runtime.base_model()).config.hidden_size == 64


def test_hub_id_is_passed_through(monkeypatch):
    monkeypatch.setenv("COURSE_BASE_MODEL", "some-org/Some_Model-1.5B")
    assert runtime.base_model() == "some-org/Some_Model-1.5B"
    assert not runtime.is_shipped_base()


def test_shipped_base_named_by_its_path_is_still_the_shipped_one(monkeypatch):
    assert runtime.is_shipped_base()
    monkeypatch.setenv("COURSE_BASE_MODEL", str(runtime.models_dir() / "base"))
    assert runtime.is_shipped_base()


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./folder", "~/no/such", "folder", "a/b/c", "C:\\models\\x", "org/"]
)
def test_base_model_that_does_not_exist(name, monkeypatch):
    monkeypatch.setenv("COURSE_BASE_MODEL", name)
    with pytest.raises(InputError) as caught:
        runtime.base_model()
    assert name in str(caught.value) and "no such folder" in str(caught.value) and "unset it" in str(caught.value)


def test_mistyped_relative_folder_is_not_taken_for_a_hub_id(tiny_model_folder, monkeypatch):
    monkeypatch.chdir(tiny_model_folder.parent.parent)
    monkeypatch.setenv("COURSE_BASE_MODEL", f"{tiny_model_folder.parent.name}/modle")
    with pytest.raises(InputError, match="no such folder"):
        runtime.base_model()


def test_relative_folder_counts_from_the_course_too_since_kernels_run_in_notebooks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_BASE_MODEL", "models/base")
    assert runtime.base_model() == str(runtime.models_dir() / "base") and runtime.is_shipped_base()
    monkeypatch.setenv("COURSE_BASE_MODEL", "models/bse")
    with pytest.raises(InputError, match="no such folder"):
        runtime.base_model()


def test_base_model_that_is_a_file(tiny_model_folder, monkeypatch):
    monkeypatch.setenv("COURSE_BASE_MODEL", str(tiny_model_folder / "model.safetensors"))
    with pytest.raises(InputError, match="is a file"):
        runtime.base_model()


def _cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: _cut(folder / "config.json", 40), "config.json can't be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "does not hold a JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file .*model.safetensors"),
        (lambda folder: _cut(folder / "model.safetensors", 100_000), "model.safetensors is cut short"),
        (lambda folder: _cut(folder / "model.safetensors", -1), "model.safetensors is cut short"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle"),
    ],
)
def test_damaged_base_model(damage, sentence, tiny_model_folder, monkeypatch):
    monkeypatch.setenv("COURSE_BASE_MODEL", str(tiny_model_folder))
    assert runtime.base_model() == str(tiny_model_folder)
    damage(tiny_model_folder)
    with pytest.raises(InputError, match=sentence):
        runtime.base_model()


def test_model_in_several_files(tiny_model, tmp_path, monkeypatch):
    tiny_model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    monkeypatch.setenv("COURSE_BASE_MODEL", str(tmp_path / "sharded"))
    assert runtime.base_model() == str(tmp_path / "sharded")
    shards[-1].unlink()
    with pytest.raises(InputError, match=shards[-1].name):
        runtime.base_model()


def test_shipped_model_missing_says_how_to_restore_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "project_root", lambda: tmp_path)
    with pytest.raises(InputError, match="git checkout"):
        runtime.base_model()


# ---------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def shipped_adapter(tiny_model, tmp_path, monkeypatch):
    """A checkout of its own, with one adapter in its models."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(runtime, "project_root", lambda: tmp_path)
    folder = tmp_path / "models" / "adapters" / "reading"
    get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def test_adapter_path(shipped_adapter):
    assert runtime.adapter_path("reading") == shipped_adapter
    with pytest.raises(InputError, match="no adapter 'raeding'.* Choose one of: reading"):
        runtime.adapter_path("raeding")


def test_truncated_adapter_is_named(shipped_adapter):
    _cut(shipped_adapter / "adapter_model.safetensors", -10)
    with pytest.raises(InputError, match="reading/adapter_model.safetensors is cut short"):
        runtime.adapter_path("reading")


def test_adapter_without_weights(shipped_adapter):
    (shipped_adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="no file .*adapter_model.safetensors"):
        runtime.adapter_path("reading")


def test_with_another_base_adapters_come_from_runs(shipped_adapter, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COURSE_BASE_MODEL", str(tiny_model_folder))
    with pytest.raises(InputError, match=runtime.TRAIN_ADAPTERS_COMMAND):
        runtime.adapter_path("reading")
    shutil.copytree(shipped_adapter, runtime.adapters_dir() / "reading")
    assert runtime.adapter_path("reading").is_relative_to(tmp_path / "runs" / "adapters")
    # Another folder that happens to bear the same name must not be handed these adapters.
    namesake = tmp_path / "other" / tiny_model_folder.name
    shutil.copytree(tiny_model_folder, namesake)
    monkeypatch.setenv("COURSE_BASE_MODEL", str(namesake))
    with pytest.raises(InputError):
        runtime.adapter_path("reading")


# ---------------------------------------------------------------------------------------------- machine


@pytest.fixture
def another_base(tiny_model_folder, monkeypatch):
    monkeypatch.setenv("COURSE_BASE_MODEL", str(tiny_model_folder))


def _pretend(monkeypatch, cuda=False, bf16=False, mps=False):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("machine", "kind", "dtype", "settings"),
    [
        ({}, "cpu", "float32", {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}),
        (
            {"cuda": True, "bf16": True},
            "cuda",
            "bfloat16",
            {"use_cpu": False, "bf16": True, "dataloader_pin_memory": True},
        ),
        ({"cuda": True}, "cuda", "float32", {"use_cpu": False, "bf16": False, "dataloader_pin_memory": True}),
        ({"mps": True}, "mps", "float32", {"use_cpu": False, "bf16": False, "dataloader_pin_memory": False}),
    ],
)
def test_device_and_settings_follow_the_machine(machine, kind, dtype, settings, another_base, monkeypatch):
    import torch

    _pretend(monkeypatch, **machine)
    assert runtime.device().type == kind
    assert runtime.dtype() is getattr(torch, dtype)
    assert runtime.trainer_settings().items() >= settings.items()


def test_the_shipped_model_runs_on_the_cpu_even_beside_a_gpu(monkeypatch):
    _pretend(monkeypatch, cuda=True, bf16=True)
    assert runtime.device().type == "cpu" and runtime.trainer_settings()["use_cpu"]


def test_settings_are_taken_by_both_configurations(tmp_path):
    from transformers import TrainingArguments
    from trl import SFTConfig

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # the library warns of a deprecated keyword in its own name
        for configuration in (TrainingArguments, SFTConfig):
            made = configuration(output_dir=str(tmp_path), **runtime.trainer_settings())
            assert (
                made.device.type == "cpu"
                and not made.bf16
                and not made.activation_checkpointing
                and made.report_to == []
            )


def test_seed_everything_makes_draws_repeat():
    import numpy
    import torch

    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    runtime.seed_everything(3)
    first = draw()
    assert draw() != first
    runtime.seed_everything(3)
    assert draw() == first
    runtime.seed_everything(4)
    assert all(new != old for new, old in zip(draw(), first))


def test_progress_bars_are_off_whether_libraries_are_imported_before_or_after():
    for when in ("before", "after"):
        imports = "import datasets, huggingface_hub, transformers"
        call = "from course_utils.runtime import disable_progress_bars; disable_progress_bars()"
        lines = [imports, call] if when == "before" else [call, imports]
        done = run_python(
            "\n".join(lines)
            + "\nprint(datasets.are_progress_bars_disabled(), huggingface_hub.utils.are_progress_bars_disabled(),"
            + " not transformers.utils.logging.is_progress_bar_enabled())",
            HF_DATASETS_DISABLE_PROGRESS_BARS=None,
            HF_HUB_DISABLE_PROGRESS_BARS=None,
        )
        assert done.stdout.split() == ["True"] * 3, (when, done.stdout, done.stderr[-500:])


# ---------------------------------------------------------------------------------------------- the one message

# Makes bitsandbytes take this processor for one with AVX512-BF16, where it logs the message while it is imported.
PRETEND_AVX512_BF16 = """
import importlib.abc, importlib.machinery, logging, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.functional":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            module.has_avx512bf16 = lambda: True
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
sys.modules["kernels"] = None  # as if it were not installed
"""
MESSAGE = "Failed to load CPU gemm_4bit_forward"


def test_the_message_is_really_there_unless_filtered():
    done = run_python(PRETEND_AVX512_BF16 + "import bitsandbytes")
    assert done.returncode == 0 and MESSAGE in done.stderr


def test_quiet_imports_leaves_stderr_empty_and_other_records_alone():
    done = run_python(
        PRETEND_AVX512_BF16
        + textwrap.dedent(
            """
            from course_utils.runtime import quiet_imports
            quiet_imports()
            import peft
            sys.stderr.write("IMPORTED\\n")
            logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
            logger.warning("something else: %s", 1)
            logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", OSError("another cause"))
            """
        )
    )
    assert done.returncode == 0, done.stderr
    before, after = done.stderr.split("IMPORTED\n")
    assert before == ""
    assert after.splitlines() == [
        "something else: 1",
        "Failed to load CPU gemm_4bit_forward from kernels-community: another cause",
    ]


# ---------------------------------------------------------------------------------------------- a whole session

SESSION = """
import socket, sys, warnings
attempts = []
def forbid(*args, **kwargs):
    attempts.append(args)
    raise OSError("no network here")
socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = forbid

from course_utils.runtime import Progress, disable_progress_bars, quiet_imports, saving, trainer_settings
quiet_imports()
disable_progress_bars()
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 4
trainer = SFTTrainer(
    model=model, args=SFTConfig(output_dir=OUT, max_steps=2, save_strategy="no", **trainer_settings()),
    train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=LoraConfig(r=4, target_modules="all-linear"))
Progress().attach(trainer).train()
with saving(OUT) as folder:
    trainer.model.save_pretrained(folder)
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), OUT)
import huggingface_hub.utils._telemetry as telemetry
telemetry._TELEMETRY_QUEUE.join()  # reports are sent by a thread of their own
print("attempts", attempts)
warnings.warn("another library's warning", FutureWarning)
"""


def test_loading_training_and_saving_call_no_server_and_say_nothing_on_stderr(tiny_model_folder, tmp_path):
    done = run_python(
        f"BASE = {str(tiny_model_folder)!r}; OUT = {str(tmp_path / 'out')!r}\n" + SESSION,
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_TELEMETRY=None,
        HF_UPDATE_DOWNLOAD_COUNTS=None,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "attempts []"
    # The last line shows that warnings do reach stderr.
    said = [line for line in done.stderr.splitlines() if line]
    assert len(said) == 1 and said[0].endswith("FutureWarning: another library's warning"), done.stderr


def test_threads_sleep_while_they_wait_unless_told_otherwise():
    """The setting counts only if it is there before torch is."""
    code = "import os, sys, course_utils; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    assert run_python(code, OMP_WAIT_POLICY=None).stdout.split() == ["False", "PASSIVE"]
    assert run_python(code, OMP_WAIT_POLICY="ACTIVE").stdout.split() == ["False", "ACTIVE"]


# ---------------------------------------------------------------------------------------------- environment


def _lines(requirements, tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text(requirements)
    return [str(check) for check in runtime._package_checks(path)]


def test_report_on_this_environment_reads_well():
    report = runtime.environment_report()
    lines = str(report).splitlines()
    assert len(lines) == len(report) and all(line.startswith(("[OK]   ", "[FAIL] ")) for line in lines)
    for subject in ("Python 3.", "transformers", "free for results", "memory", "device cpu", "base model"):
        assert any(subject in line for line in lines), subject
    assert all(check.ok for check in report if not check.what.startswith("base model")), str(report)


def test_package_lines(tmp_path):
    import torch

    release = torch.__version__.split("+")[0]
    lines = _lines(
        f"# comment\n-c constraints.txt\n-e .\ntorch=={release}  # every lesson\npytest==0.1\nno-such-package==1.0 # x\n",
        tmp_path,
    )
    assert len(lines) == 3
    assert lines[0].startswith(f"[OK]   torch {release}")  # a build's own tag, as in +cpu, is no other version
    assert lines[1].startswith("[FAIL] pytest is ") and "written for 0.1" in lines[1] and "pip install" in lines[1]
    assert lines[2].startswith("[FAIL] no-such-package is missing")


def test_old_python_fails_with_a_remedy(monkeypatch):
    monkeypatch.setattr(runtime.sys, "version_info", (3, 10, 4))
    line = runtime.environment_report()[0]
    assert not line.ok and "newer Python" in str(line)


def test_little_disk_little_memory_and_a_broken_base_fail_with_a_remedy(tmp_path, monkeypatch):
    import psutil

    monkeypatch.setattr(runtime.shutil, "disk_usage", lambda place: SimpleNamespace(free=1e8))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9))
    monkeypatch.setenv("COURSE_BASE_MODEL", "/no/such/folder")
    report = runtime.environment_report()
    failed = [str(check) for check in report if not check.ok]
    assert not report.ok and len(failed) == 3
    assert "0.1 GB free" in failed[0] and "Close other programs" in failed[1] and "/no/such/folder" in failed[2]


def test_missing_torch_is_a_line_not_a_crash(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert str(runtime._device_check()).startswith("[FAIL] torch can't be imported")


# ---------------------------------------------------------------------------------------------- progress


def _trainer(model, tokenizer, folder, steps=6, **options):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 8
    settings = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        logging_steps=2,
        save_strategy="no",
        **runtime.trainer_settings(),
        **options,
    )
    data = Dataset.from_list(rows)
    return SFTTrainer(model=model, args=settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def test_progress_prints_the_last_step_and_the_losses_and_no_dicts(tiny_model, tiny_tokenizer, tmp_path, capsys):
    trainer = _trainer(tiny_model, tiny_tokenizer, tmp_path, eval_strategy="steps", eval_steps=3)
    runtime.Progress().attach(trainer).train()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("step 6 of 6 · loss ") and " · validation loss " in lines[-1]
    assert not any("{" in line for line in lines)
    assert not any("left" in line for line in lines[-1:])


def test_progress_of_a_run_that_stops_early_does_not_claim_the_rest(tiny_model, tiny_tokenizer, tmp_path, capsys):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3
            return control

    trainer = _trainer(tiny_model, tiny_tokenizer, tmp_path)
    trainer.add_callback(Stop())
    runtime.Progress().attach(trainer).train()
    assert capsys.readouterr().out.splitlines()[-1].startswith("step 3 of 6")


def test_progress_in_a_notebook_is_one_saved_text_without_widgets():
    import nbformat
    from nbclient import NotebookClient

    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from course_utils.runtime import disable_progress_bars
disable_progress_bars()
from course_utils.progress import ProgressLine
for lab in range(2):
    line = ProgressLine(3, unit="batch")
    for done in range(1, 4):
        line.update(done, f"lab {{lab}} loss <1>")
"""
    cells = [nbformat.v4.new_code_cell(text) for text in (code, "ProgressLine(9).update(1)")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=200, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs  # one for both labs, and no warning about missing widgets
    assert output.data["text/plain"] == "batch 3 of 3 · lab 1 loss <1>"
    assert output.data["text/html"] == "<pre>batch 3 of 3 · lab 1 loss &lt;1&gt;</pre>"
    (output,) = notebook.cells[1].outputs  # a new cell has a line of its own
    assert output.data["text/plain"].startswith("step 1 of 9")
    assert "widgets" not in notebook.metadata and "widget" not in json.dumps(notebook)


def test_time_left_counts_from_where_work_was_resumed(monkeypatch, capsys):
    from course_utils import progress

    clock = iter([0.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    progress.ProgressLine(100, begun=60).update(80)
    assert capsys.readouterr().out == "step 80 of 100 · about 20 s left\n"


def test_progress_line_prints_seldom_outside_a_notebook(capsys):
    from course_utils.progress import ProgressLine

    line = ProgressLine(1000)
    for done in range(1, 1001):
        line.update(done)
    assert capsys.readouterr().out == "step 1000 of 1000\n"
