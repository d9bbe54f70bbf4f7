"""What holds for every public function: types, and a finding or an InputError instead of a traceback."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import adapter_checks
from adapter_checks import InputError, Report, counting, device, generation, memory, merging, model_folder
from adapter_checks.safetensors_header import read_safetensors_header
from adapter_checks.saving import saving

MODULES = [
    f"adapter_checks.{module.name}"
    for module in pkgutil.iter_modules(adapter_checks.__path__)
    if module.name != "__main__"
]
CHECKS = [name for name in adapter_checks.__all__ if name.startswith(("check_", "compare_"))]
ODD = [None, 3, "nowhere", "", object(), [], {}, b"x", {"a": 1}, float("nan"), "a\0b", "~nobody-of-this-name/x"]


def named(value):
    """An id that is the same in every process, which the address in an object's own repr is not."""
    return f"{type(value).__name__} {value}" if type(value) is not object else "object"


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_has_types(module):
    functions = [
        function
        for name, function in vars(importlib.import_module(module)).items()
        if inspect.isfunction(function) and function.__module__ == module and not name.startswith("_")
    ]
    for function in functions:
        names = [*inspect.signature(function).parameters, "return"]
        assert set(names) == set(function.__annotations__), f"{module}.{function.__name__}"


@pytest.mark.parametrize("odd", ODD, ids=named)
@pytest.mark.parametrize("name", CHECKS)
def test_checks_answer_anything_with_a_failure(name, odd):
    check = getattr(adapter_checks, name)
    needed = [
        parameter
        for parameter in inspect.signature(check).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    report = check(*[odd] * len(needed))
    assert isinstance(report, Report) and not report.ok
    assert all(finding.message and finding.remedy for finding in report.findings if finding.level != "ok")


@pytest.mark.parametrize("odd", [value for value in ODD if not isinstance(value, (list, dict))], ids=named)
@pytest.mark.parametrize(
    "call",
    [
        lambda odd: counting.count_lora_parameters(odd, odd),
        lambda odd: memory.estimate_memory(odd, "lora", odd, batch_size=1, sequence_length=1),
        lambda odd: memory.estimate_memory(odd, odd, batch_size=1, sequence_length=1),
        lambda odd: memory.estimate_memory(odd, "full", batch_size=odd, sequence_length=1),
        lambda odd: merging.merge_whole(odd, odd, odd),
        lambda odd: merging.merge_by_shards(odd, odd, odd),
        lambda odd: merging.merge_to_folder(odd, odd, odd),
        lambda odd: model_folder.local_folder(odd),
        lambda odd: model_folder.load_config(odd),
    ],
)
def test_the_rest_raises_a_sentence(call, odd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"\w.*[.:]"):
        call(odd)
    assert not list(tmp_path.iterdir())


def test_a_check_never_changes_a_dropout_layer_to_training(tiny_model):
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    before = [module.training for module in tiny_model.modules()]
    with generation.evaluating(tiny_model):
        assert not any(module.training for module in tiny_model.modules())
    assert [module.training for module in tiny_model.modules()] == before


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_best_device(cuda, mps, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert device.best_device().type == expected


@pytest.mark.parametrize(("given", "asked"), [(None, True), ("cpu", False)])
def test_merged_folders_are_checked_on_the_best_device(given, asked, tiny_folders, monkeypatch):
    import torch

    calls = []
    monkeypatch.setattr("adapter_checks.merged_folder.best_device", lambda: calls.append(1) or torch.device("cpu"))
    folders = [tiny_folders / name for name in ("base", "adapter", "merged")]
    assert adapter_checks.check_merged_folder(*folders, device=given).codes == []
    assert bool(calls) is asked


def test_importing_is_light():
    code = "import sys, adapter_checks.command; print([m for m in ('torch', 'transformers', 'peft', 'numpy') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_headers_and_saving_refuse_odd_places(tmp_path):
    for odd in (tmp_path, tmp_path / "nowhere", ""):
        with pytest.raises(InputError):
            read_safetensors_header(odd)
    (tmp_path / "file").touch()
    with pytest.raises(InputError), saving(tmp_path / "file"):
        pass
