"""Imports, device, settings, and what a whole session says and asks for."""

import os
import random
import subprocess
import sys
import textwrap
import warnings

import pytest

from adapter_checks.errors import InputError
from course_utils import runtime


def run_python(code, *, cwd=None, **environment):
    """Run code in a fresh interpreter; a variable given as None is taken out of the environment."""
    variables = {**os.environ, **environment}
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


def test_course_device_names_another(monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", " meta ")  # the one other device that each machine has
    assert runtime.device().type == "meta" and not runtime.trainer_settings()["use_cpu"]
    assert str(runtime.dtype()) == "torch.float32", "the shipped model keeps its numbers on each device"
    monkeypatch.setenv("COURSE_DEVICE", "abacus")
    with pytest.raises(InputError, match="abacus"):
        runtime.device()


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
        call = "from course_utils.runtime import quiet_imports; quiet_imports()"
        lines = [imports, call] if when == "before" else [call, imports]
        done = run_python(
            "\n".join(lines)
            + "\nprint(datasets.are_progress_bars_disabled(), huggingface_hub.utils.are_progress_bars_disabled(),"
            + " not transformers.utils.logging.is_progress_bar_enabled())",
            HF_DATASETS_DISABLE_PROGRESS_BARS=None,
            HF_HUB_DISABLE_PROGRESS_BARS=None,
        )
        assert done.stdout.split() == ["True"] * 3, (when, done.stdout, done.stderr[-500:])


def test_no_library_finds_a_gpu_where_the_lessons_run_on_the_cpu_by_choice(tmp_path):
    call = "import os; from course_utils.runtime import quiet_imports; quiet_imports(); print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    base = tmp_path / "base"
    base.mkdir()
    other = {"COURSE_BASE_MODEL": str(base)}
    cases = (({}, ""), ({"COURSE_DEVICE": "cuda"}, "0"), (other, "0"), (other | {"COURSE_DEVICE": "cpu"}, ""))
    for changes, seen in cases:
        done = run_python(call, **{"CUDA_VISIBLE_DEVICES": "0", "COURSE_DEVICE": None} | changes)
        assert done.stdout.strip() == seen, (changes, done.stderr[-500:])


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

from course_utils.runtime import quiet_imports, trainer_settings
quiet_imports()
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from adapter_checks.saving import saving
from course_utils.progress import Progress

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
