"""What the course ships: the task data, the base model and the adapters, as they lie in the checkout."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adapter_checks.safetensors_header import read_safetensors_header
from course_utils import data, evaluation, paths
from course_utils.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ("reading", "sailor", "extract", "mood", "honesty_start")
WORD = re.compile(r"\w+")
FULL_NAME = re.compile(r"[A-Z]\w+ [A-Z]\w+")


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    """Name and splits of each task, read without `datasets`, so that what it might mend shows."""
    files = data.task_files(request.param)
    return request.param, {
        split: [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        for split, path in files.items()
    }


@pytest.fixture(scope="module")
def base():
    """The shipped base model, loaded as anybody would without the course."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = paths.models_dir() / "base"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------- data


def test_rows_have_the_form_that_lessons_and_trainers_expect(task):
    for split, rows in task[1].items():
        assert rows, split
        for row in rows:
            assert set(row) == {"prompt", "completion", "kind", "novel"}
            for part, role in (("prompt", "user"), ("completion", "assistant")):
                (message,) = row[part]
                assert set(message) == {"role", "content"} and message["role"] == role
                assert message["content"] and message["content"] == message["content"].strip()
            assert isinstance(row["kind"], str) and row["kind"] and isinstance(row["novel"], bool)


def test_answers_are_right_by_the_tasks_own_metric(task):
    """An answer that its metric rejects could never be reached; one that is not an answer of the task, neither."""
    name, splits = task
    for rows in splits.values():
        for row in rows:
            answer = row["completion"][0]["content"]
            assert TASKS[name].metric(answer, answer)
            if name == "extract":
                fields = json.loads(answer)
                assert tuple(fields) == ("who", "what", "where") and all(
                    isinstance(v, str) and v for v in fields.values()
                )
            if name == "mood":
                assert answer in ("happy", "unhappy")


@pytest.mark.parametrize("name", ("reading", "sailor", "extract", "honesty"))
@pytest.mark.parametrize("part", ("own_words", "typed"))
def test_further_parts_have_rows_of_their_task(name, part):
    rows = data.load_task(name, part)
    assert len(rows) >= 40 and all(rows["novel"])
    for row in rows:
        answer = row["completion"][0]["content"]
        assert TASKS[name].metric(answer, answer) and row["prompt"][0]["role"] == "user"
    assert not set(prompts_of(rows)) & set(prompts_of(data.load_task(name, "train")))


def prompts_of(rows):
    return [row["prompt"][0]["content"] for row in rows]


def test_splits_share_no_row(task):
    every = [prompt for rows in task[1].values() for prompt in prompts_of(rows)]
    assert len(set(every)) == len(every)


def test_the_test_split_has_novel_rows_which_name_what_training_never_did(task):
    name, splits = task
    assert {row["novel"] for row in splits["test"]} == {True, False}
    assert not any(row["novel"] for split in ("train", "validation") for row in splits[split])
    # The people of recall share their given names and surnames, so there a full name is what is new.
    pattern = FULL_NAME if name == "recall" else WORD
    known = {word for prompt in prompts_of(splits["train"]) for word in pattern.findall(prompt)}
    novel = prompts_of(row for row in splits["test"] if row["novel"])
    assert len(novel) >= 200
    for prompt in novel:
        assert set(pattern.findall(prompt)) - known, prompt


def test_recall_tests_facts_that_it_taught():
    splits = data.load_task("recall")
    taught = {name for prompt in prompts_of(splits["train"]) for name in FULL_NAME.findall(prompt)}
    for split in ("validation", "test"):
        for row in splits[split]:
            assert row["novel"] or FULL_NAME.findall(row["prompt"][0]["content"])[0] in taught


def test_datasets_loads_every_row(task):
    name, splits = task
    loaded = data.load_task(name)
    assert {split: len(rows) for split, rows in loaded.items()} == {split: len(rows) for split, rows in splits.items()}
    assert all(loaded[split][-1] == splits[split][-1] for split in splits)


def test_every_row_fits_the_context(task, base):
    model, tokenizer = base
    longest = max(
        len(tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"])
        for rows in task[1].values()
        for row in rows
    )
    assert longest <= model.config.max_position_embeddings


# ---------------------------------------------------------------------------------------------- base model


def test_base_model_is_whole_and_small():
    assert paths.base_model() == str(ROOT / "models" / "base")
    header = read_safetensors_header(ROOT / "models" / "base" / "model.safetensors")
    assert not any(path.suffix in (".bin", ".pt", ".pth", ".pkl") for path in (ROOT / "models").rglob("*"))
    parameters = sum(_product(shape) for _, shape in header.values())
    assert 3e6 <= parameters <= 8e6


def _product(shape):
    count = 1
    for size in shape:
        count *= size
    return count


def test_base_model_loads_with_plain_transformers_without_course_or_network():
    code = f"""
import socket, sys
def forbid(*args, **kwargs):
    raise OSError("no network here")
socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = forbid
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained({str(ROOT / "models" / "base")!r}, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained({str(ROOT / "models" / "base")!r})
inputs = tokenizer.apply_chat_template([{{"role": "user", "content": "Good morning."}}], add_generation_prompt=True,
                                       return_dict=True, return_tensors="pt")
text = tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1]:])
print(any(info.values()), "course_utils" in sys.modules, len(text) > 5)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["False", "False", "True"], done.stderr


def test_dimensions_suit_4_bit_blocks_and_few_shot_prompts(base):
    import torch

    model, tokenizer = base
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == 0 and module.out_features % 64 == 0, name
    assert model.config.model_type == "llama" and model.config.max_position_embeddings >= 512
    assert len(tokenizer) == model.config.vocab_size <= 4096


def test_chat_template_marks_what_the_assistant_says(base):
    _, tokenizer = base
    messages = [{"role": "user", "content": "Where is the lamp?"}, {"role": "assistant", "content": "In the mill."}]
    whole = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mask in zip(whole["input_ids"], whole["assistant_masks"]) if mask]
    # The end of the turn is part of what the model must learn to say.
    assert tokenizer.decode(said, skip_special_tokens=True).strip() == "In the mill." and tokenizer.eos_token_id in said
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole["input_ids"][: len(prompt)] == prompt
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_every_special_token_stands_in_one_trained_row(base):
    """A row that pretraining never touched keeps the norm it was drawn with; LoRA can't teach it."""
    model, tokenizer = base
    weights = model.get_input_embeddings().weight.detach()
    norms = weights.norm(dim=1)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": '{"who": "b"}'}]
    used = set(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]) - {tokenizer.pad_token_id}
    assert min(norms[i] for i in used) > 0.3 * norms.median()


# ---------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_folder_is_sound(name):
    folder = paths.adapter_path(name)
    from course_utils.validation import check_adapter_folder

    report = check_adapter_folder(folder, base=paths.base_model())
    assert report.ok, str(report)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert not os.path.isabs(config["base_model_name_or_path"]), "the place on the maker's machine must not be shipped"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name in TASKS])
def test_adapter_has_learned_its_task(name):
    """A smoke test on few rows, that a swap of two adapters or a stale one does not pass; the model card has the scores."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(paths.base_model())
    model = AutoModelForCausalLM.from_pretrained(paths.base_model())
    rows = data.load_task(name, "test").select(range(64))
    before = evaluation.evaluate_task(model, tokenizer, name, rows)["score"]
    model = PeftModel.from_pretrained(model, paths.adapter_path(name))
    after = evaluation.evaluate_task(model, tokenizer, name, rows)["score"]
    assert before <= (0.65 if name == "mood" else 0.1) and after >= 0.8
