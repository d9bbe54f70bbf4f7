"""All lessons, top to bottom, on a small random model of another architecture, with another chat template and no BOS token.

It learns nothing, so no lesson may assert what only the shipped model does. It takes as long as the lessons do, so it has a target
of its own, `make test-other-base`, which sets TEST_OTHER_BASE.
"""

import os

import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from course_utils import paths
from pretraining import adapters
from test_common_path import CHATML
from tools import build, editions

LESSONS = sorted((build.ROOT / "lessons").glob("*.py"))
slow = pytest.mark.skipif(
    "TEST_OTHER_BASE" not in os.environ, reason="takes many minutes; make test-other-base runs it"
)


def make_base(folder):
    """A Qwen3 of two layers with the words of the course's tokenizer and ChatML."""
    tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<|endoftext|>"]}
    )
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What a learner sets, with the adapters that `python -m pretraining.adapters` makes, trained for a few steps each."""
    changes = {
        "COURSE_BASE_MODEL": str(make_base(tmp_path_factory.mktemp("base"))),
        "COURSE_RUNS": str(tmp_path_factory.mktemp("runs")),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setenv(name, value)
        for task in (*adapters.SHIPPED, "honesty"):
            patch.setitem(adapters.STEPS, task, 12)
            model, *_ = adapters.train_one(task)
            adapters.save_adapter(model, paths.adapters_dir() / (adapters.START if task == "honesty" else task))
    return {**os.environ, **changes}


def first_error(notebook, environment):
    """What stops the notebook, with the cell's id, or None."""
    client = NotebookClient(notebook, timeout=1800, extra_arguments=["--log-level=ERROR"])
    with client.setup_kernel(cwd=str(build.ROOT / "notebooks"), env=environment):
        for index, cell in enumerate(notebook.cells):
            try:
                if cell.cell_type == "code":
                    client.execute_cell(cell, index)
            except CellExecutionError as error:
                return f"{cell.id}: {error.ename}: {error.evalue}"
    return None


@slow
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_runs_on_another_base(path, environment):
    lesson = editions.learner(editions.parse(path.read_text(encoding="utf-8"), path.name))
    assert first_error(lesson, environment) is None


@slow
def test_a_lesson_that_asks_for_the_shipped_model_is_found(environment):
    sources = ["from course_utils import paths", "assert paths.is_shipped_base(), 'only the shipped model'"]
    cells = [new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(sources)]
    assert first_error(new_notebook(cells=cells), environment) == "cell-1: AssertionError: only the shipped model"
