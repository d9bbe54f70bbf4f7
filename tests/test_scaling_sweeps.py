"""Lesson 11's sweep on serving, and the script for a GPU, tried on a CPU with a model made small."""

import subprocess
import sys

import pytest

from course_utils import data, paths
from experiments import real_sizes, serving


@pytest.fixture(scope="module")
def measured():
    return serving.measure(seed=0, adapters=2)


def test_a_run_on_serving_has_what_the_lesson_reads(measured):
    assert set(measured) <= set(data.load_results("serving")[0])
    assert all(value > 0 for name, value in measured.items() if name != "difference")
    assert 0 <= measured["difference"] < 1e-4, "gathered as PEFT has it"


def test_the_memory_is_that_of_the_weights(measured):
    base = sum(file.stat().st_size for file in (paths.models_dir() / "base").glob("*.safetensors")) / 1e6
    assert measured["merged_mb"] == pytest.approx(2 * base, rel=0.01)
    assert base < measured["adapters_mb"] < 1.1 * base


def test_the_processors_time_is_counted_and_not_the_first_call():
    calls = []
    assert serving.milliseconds(lambda: calls.append(sum(range(10**5))), times=3) > 0
    assert len(calls) == 4


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_script_for_a_gpu_trains_on_a_cpu(method, monkeypatch):
    small = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, tie_word_embeddings=False
    )
    monkeypatch.setitem(real_sizes.SHAPES, "1B", small)
    monkeypatch.setitem(real_sizes.COMMON, "vocab_size", 256)
    found = real_sizes.measure(seed=0, size="1B", method=method, device="cpu", length=32)
    assert found["tokens_a_second"] > 0 and found["trl_tokens_a_second"] > 0
    assert found["predicted_gb"] > 0 and found["peak_gb"] == found["trl_peak_gb"] == 0


def test_without_a_gpu_nothing_is_run():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.real_sizes"], capture_output=True, text=True, cwd=paths.project_root()
    )
    assert done.returncode == 1 and "needs a CUDA GPU" in done.stderr and "Traceback" not in done.stderr
