"""What the tests share: tiny models (from the tests of adapter_checks), and a folder for results."""

import os

# Before any library reads it: no test may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import matplotlib
import pytest

from support import short_answers
from tiny_models import make_tiny_model, make_tiny_tokenizer, tiny_model, tiny_model_folder, tiny_tokenizer  # noqa: F401 (fixtures)

matplotlib.use("agg")


@pytest.fixture(autouse=True, scope="session")
def results_elsewhere(tmp_path_factory):
    """Tests leave a learner's own `runs/` alone, and use the shipped base model unless they say otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.delenv("COURSE_BASE_MODEL", raising=False)
        yield


# For the scripts of experiments/


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A folder with a random model whose context takes a few rows at one token a byte."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tiny_tokenizer()
    model = make_tiny_model(tokenizer)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def results(tiny_base, tmp_path, monkeypatch):
    """Where results go: with another base than the shipped one, never among the committed ones."""
    from experiments import harness

    short_answers(monkeypatch)  # a random model says nothing worth waiting for
    monkeypatch.setenv("COURSE_BASE_MODEL", str(tiny_base))
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    assert harness.folder().is_relative_to(tmp_path)
    return harness.folder()


@pytest.fixture
def short_rows(monkeypatch):
    """Eight short rows in the place of every split."""
    from course_utils import data

    load_task = data.load_task
    monkeypatch.setattr(
        data,
        "load_task",
        lambda task, split: (
            load_task(task, split).filter(lambda row: len(row["prompt"][0]["content"]) < 120).select(range(8))
        ),
    )
