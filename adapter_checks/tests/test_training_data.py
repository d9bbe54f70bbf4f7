"""The checks for fine-tuning: each passes on a healthy trainer, model or row, and finds the fault that is planted."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    GenerationConfig,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from adapter_checks import check_adapters, check_sft_data, check_supervision, check_training
from adapter_checks.bitsandbytes_workarounds import quiet_imports
from adapter_checks.training import _too_small_a_step
from adapter_checks.training_data import _ends
from tiny_models import CPU_TRAINING, make_tiny_adapter, make_tiny_model, make_tiny_tokenizer

quiet_imports()
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def row(question="Who has the key?", answer="Tobin"):
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


ROWS = [row(f"Who has key {number}?", "Tobin" + "!" * (number % 3)) for number in range(12)]
PLAIN = [{"prompt": "Who has the key? ", "completion": "Tobin"}] * 3
CHATS = [{"messages": entry["prompt"] + entry["completion"]} for entry in ROWS]


def user(content):
    return {"role": "user", "content": content}


def bot(content, **more):
    return {"role": "assistant", "content": content, **more}


TALK = [user("Who has the key?"), bot("Tobin."), user("And the boat?"), bot("Hanna has it.")]
OLD_FORM = [{"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in TALK]}]
CALL = {"type": "function", "function": {"name": "find_key", "arguments": {"room": 1}}}


def lora(**changes):
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    )


def settings(folder, **changes):
    usual = CPU_TRAINING | {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    return {"output_dir": str(folder), **usual, "lr_scheduler_type": "constant", "save_strategy": "no", **changes}


def sft_trainer(folder, rows=ROWS, tokenizer=None, model=None, peft_config=None, **changes):
    tokenizer = tokenizer or make_tiny_tokenizer()
    return SFTTrainer(
        model or make_tiny_model(tokenizer),
        args=SFTConfig(**settings(folder, **changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config or (None if model else lora()),
    )


def plain_trainer(folder, tokenizer, model=None, optimizers=(None, None), **changes):
    """transformers' own Trainer on whole conversations, with its collator, which masks every pad."""
    encoded = [tokenizer.apply_chat_template(chat["messages"], return_dict=True) for chat in CHATS]
    return Trainer(
        model or get_peft_model(make_tiny_model(tokenizer), lora()),
        args=TrainingArguments(**settings(folder, **changes)),
        train_dataset=Dataset.from_list([dict(entry) for entry in encoded]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        optimizers=optimizers,
    )


def trained(trainer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer


def message(report, code):
    return next(finding.message for finding in report.findings if finding.code == code)


def hand_made(tokenizer, *pairs, **changes):
    """A batch as a loop of one's own makes it: prompt masked, rows padded at the right."""
    rows = [(tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]) for prompt, answer in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in rows:
        pads = longest - len(prompt) - len(answer)
        batch["input_ids"].append(prompt + answer + [tokenizer.pad_token_id] * pads)
        batch["attention_mask"].append([1] * (longest - pads) + [0] * pads)
        batch["labels"].append([-100] * len(prompt) + answer + [-100] * pads)
    return {name: torch.tensor(entry) for name, entry in batch.items()} | changes


# ------------------------------------------------------------------------------------------------ check_sft_data


@pytest.mark.parametrize(
    "rows", [ROWS, Dataset.from_list(ROWS), PLAIN, CHATS, OLD_FORM, [{"text": "Tobin has the key."}], iter(ROWS)]
)
def test_healthy_rows(rows, tiny_tokenizer):
    report = check_sft_data(rows, tiny_tokenizer, 64)
    assert report.codes == [] and "carry loss" in message(report, "supervision")


def test_rows_are_tokenised_as_trl_does_it(tmp_path, tiny_tokenizer):
    merging = make_tiny_tokenizer(merges=[("Ġ", "T"), ("Ġ", "H")])
    spaced = [{"prompt": "Who has the key? ", "completion": "Tobin"}]
    with_tools = [{"messages": TALK, "tools": None, "chat_template_kwargs": {}}] * 2
    for rows, tokenizer, settings in (
        (ROWS, tiny_tokenizer, {}),
        (PLAIN, tiny_tokenizer, {}),
        (spaced, merging, {}),
        ([{"messages": TALK}], tiny_tokenizer, {"assistant_only_loss": True}),
        ([{"messages": TALK[:-1]}], tiny_tokenizer, {"assistant_only_loss": True}),
        ([{"prompt": TALK[:3], "completion": TALK[3:]}], tiny_tokenizer, {}),
        (with_tools, tiny_tokenizer, {"assistant_only_loss": True}),
    ):
        labels = sft_trainer(tmp_path, copy.deepcopy(rows), tokenizer=tokenizer, **settings).train_dataset["labels"]
        expected = sum(label != -100 for entry in labels for label in entry)
        assert f" {expected} tokens" in message(check_sft_data(rows, tokenizer), "supervision")


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ({"prompt": row()["prompt"]}, "no_completion"),
        (row() | {"completion": None}, "no_completion"),
        (row() | {"completion": []}, "no_completion"),
        (row(answer=""), "no_completion"),
        (row(answer=" \n"), "no_completion"),
        (row() | {"completion": row()["prompt"]}, "no_completion"),
        ({"messages": row()["prompt"]}, "no_completion"),
        ({"text": ""}, "no_completion"),
        ({"prompt": "Who?", "completion": ""}, "no_completion"),
        ({"prompt": "Who?", "completion": row()["completion"]}, "bad_row"),
        ({"completion": "Tobin"}, "bad_row"),
        ({"question": "Who?", "answer": "Tobin"}, "bad_row"),
        ({"messages": []}, "bad_row"),
        ({"messages": [{"content": "Tobin"}]}, "bad_row"),
        ({"messages": [{"role": "human", "content": "Who?"}, {"role": "gpt", "content": "Tobin"}]}, "no_completion"),
        ({"messages": [user("Who?"), bot(""), user("Who?"), bot("Tobin")]}, "no_completion"),
        ({"prompt": [user("Who?")], "chosen": [bot("Tobin")], "rejected": [bot("Me")]}, "no_completion"),
        ({"conversations": TALK}, "bad_row"),
        ("Who has the key? Tobin", "bad_row"),
        (None, "bad_row"),
        (row(answer="Tobin" * 12), "truncated"),
        (row(question="Who? " * 20), "no_loss"),
    ],
)
def test_a_bad_row_is_found_and_numbered(bad, code, tiny_tokenizer):
    report = check_sft_data([row(), bad, row()], tiny_tokenizer, 64)
    assert (
        report.codes == [code]
        and "In 1 of 3 rows" in message(report, code)
        and "(number 1, counted from 0)" in message(report, code)
    )


def test_an_answer_that_just_fits(tiny_tokenizer):
    length = len(
        tiny_tokenizer.apply_chat_template(row()["prompt"] + row()["completion"], return_dict=True)["input_ids"]
    )
    assert check_sft_data([row()], tiny_tokenizer, length).codes == []
    assert check_sft_data([row()], tiny_tokenizer, length - 1).codes == ["truncated"]
    assert check_sft_data([row(answer="Tobin" * 50)], tiny_tokenizer).codes == []


def test_templates():
    tokenizer = make_tiny_tokenizer()
    healthy = tokenizer.chat_template
    tokenizer.chat_template = healthy.replace("['content'] + '<|end|>'", "['content']")
    assert check_sft_data(ROWS, tokenizer).codes == ["no_end"]
    tokenizer.chat_template = healthy.replace("{% endfor %}", "{{ '\n' }}{% endfor %}")
    assert check_sft_data(ROWS, tokenizer).codes == [], "a line break behind the end of turn is usual"
    tokenizer.chat_template = healthy.replace("<|end|>", "<|user|>")
    assert check_sft_data(ROWS, tokenizer).codes == [], "an end of turn that is not EOS"
    tokenizer.chat_template = None
    assert check_sft_data(ROWS, tokenizer).codes == ["bad_row"]
    assert check_sft_data(PLAIN, tokenizer).codes == []


def test_the_reason_that_a_template_gives_is_passed_on():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    assert "System role not supported" in message(check_sft_data(CHATS, tokenizer), "bad_row")
    report = check_sft_data(
        [{"messages": [{"role": "human", "content": "Who?"}, {"role": "gpt", "content": "T"}]}], tokenizer
    )
    assert "roles: human, gpt" in message(report, "no_completion")


def test_a_prompt_that_ends_with_a_space(tiny_tokenizer):
    merging = make_tiny_tokenizer(merges=[("Ġ", "T")])
    assert check_sft_data(PLAIN, merging).codes == ["prompt_differs"]
    assert check_sft_data(PLAIN, merging).ok
    healthy = [{"prompt": "Who has the key?", "completion": " Tobin"}]
    assert check_sft_data(healthy, merging).codes == [] and check_sft_data(PLAIN, tiny_tokenizer).codes == []


def test_a_generation_prompt_that_opens_a_thought():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>' }}")
    assert check_sft_data(ROWS, tokenizer).codes == ["prompt_differs"]
    assert check_sft_data([row(answer="<think>Well.</think>Tobin")], tokenizer).codes == []


def test_two_begin_tokens(tmp_path):
    from tokenizers import processors

    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer.chat_template = "<|bos|>" + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    rendered = [{"text": tokenizer.apply_chat_template(TALK, tokenize=False)}]
    pairs = [
        {
            "prompt": tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True),
            "completion": "Tobin.<|end|>",
        }
    ]
    for rows in (rendered, pairs):
        report = check_sft_data(rows, tokenizer)
        assert report.codes == ["double_bos"] and report.ok
        without = [{key: text.removeprefix("<|bos|>") for key, text in entry.items()} for entry in rows]
        assert check_sft_data(without, tokenizer).codes == []
    assert check_sft_data(CHATS, tokenizer).codes == []
    twice = hand_made(tokenizer, ("<|bos|>Who?<|assistant|>", ""))
    twice = {
        name: torch.cat([entry, torch.tensor([[1 if name == "attention_mask" else tokenizer.eos_token_id]])], 1)
        for name, entry in twice.items()
    }
    assert check_supervision(twice, tokenizer).codes == ["double_bos"]
    apart = hand_made(tokenizer, ("Who?<|assistant|>", "Tobin.<|end|>"))
    assert check_supervision(apart, tokenizer).codes == ["double_bos"], "before prompt and answer"
    assert check_supervision(sft_trainer(tmp_path, CHATS, tokenizer, assistant_only_loss=True)).codes == []


def save_facts(tokenizer, folder, **generation):
    """A folder with a tokenizer and the two configs of its model, as on the hub; the tokenizer as loaded from there."""
    make_tiny_model(tokenizer).config.save_pretrained(folder)
    if generation:
        GenerationConfig(**generation).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_an_end_of_turn_at_which_generate_does_not_stop(tmp_path):
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    end, turn_end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert check_sft_data(ROWS, save_facts(tokenizer, tmp_path / "plain")).codes == []
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|im_end|>")
    assert check_sft_data(ROWS, tokenizer).codes == [], "no model is known that would ignore it"
    for name, generation in (("one", {"eos_token_id": end}), ("none", {})):
        loaded = save_facts(tokenizer, tmp_path / name, **generation)
        report = check_sft_data(ROWS, loaded)
        assert report.codes == ["end_ignored"] and report.ok
        assert "ends with <|im_end|>, and generate() stops at <|end|> only" in message(report, "end_ignored")
        assert check_sft_data(PLAIN, loaded).codes == [], "text ends with EOS"
    assert check_sft_data(ROWS, save_facts(tokenizer, tmp_path / "both", eos_token_id=[end, turn_end])).codes == []

    assert check_supervision(sft_trainer(tmp_path, tokenizer=tokenizer)).codes == ["end_ignored"]
    assert check_supervision(sft_trainer(tmp_path, tokenizer=tokenizer, eos_token="<|im_end|>")).codes == []
    model = make_tiny_model(tokenizer)
    model.generation_config.eos_token_id = [end, turn_end]
    assert check_supervision(sft_trainer(tmp_path, tokenizer=tokenizer, model=model)).codes == []


def test_rows_longer_than_the_context(tmp_path, tiny_tokenizer):
    long = [*ROWS, row(question="Who? " * 60)]
    tokenizer = save_facts(tiny_tokenizer, tmp_path / "base")
    report = check_sft_data(long, tokenizer, 1024)
    assert report.codes == ["beyond_context"] and report.ok
    assert "1 of 13 rows are longer than the model's context of 256" in message(report, "beyond_context")
    assert check_sft_data(long, tokenizer, 256).codes == ["no_loss"], "what is cut off is no longer too long"
    assert check_sft_data(ROWS, tokenizer, 1024).codes == []
    assert check_sft_data(long, tiny_tokenizer, 1024).codes == [], "a context that nothing names"
    alone = make_tiny_tokenizer()
    alone.model_max_length = 256
    assert check_sft_data(long, alone).codes == ["beyond_context"]
    assert check_supervision(sft_trainer(tmp_path, long)).codes == ["beyond_context"]
    assert check_supervision(sft_trainer(tmp_path, long, max_length=256)).codes == []


def test_every_answer_of_a_conversation(tiny_tokenizer):
    report = check_sft_data([{"messages": TALK}], tiny_tokenizer)
    assert report.codes == [] and " 21 tokens" in message(report, "supervision"), "both answers, each with its end"
    asked_last = check_sft_data([{"messages": TALK[:3]}], tiny_tokenizer)
    assert asked_last.codes == ["last_not_assistant"] and asked_last.ok
    assert " 7 tokens" in message(asked_last, "supervision")
    assert check_sft_data([{"prompt": TALK[:1], "completion": TALK[1:3]}], tiny_tokenizer).codes == [
        "last_not_assistant"
    ]
    length = len(tiny_tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"])
    assert check_sft_data([{"messages": TALK}], tiny_tokenizer, length - 1).codes == ["truncated"]
    assert check_sft_data([{"messages": TALK}], tiny_tokenizer, length - 20).codes == ["turns_cut"]
    assert check_sft_data([{"messages": TALK[:3]}], tiny_tokenizer, 30).codes == ["last_not_assistant"]


def test_one_letter_answers_are_found_where_they_stand(tiny_tokenizer):
    rows = [{"messages": [user("a or s?"), bot("s"), user("a, s or t?"), bot("a")]}]
    report = check_sft_data(rows, tiny_tokenizer)
    assert report.codes == [] and " 4 tokens" in message(report, "supervision")


def test_what_a_template_writes_before_an_answer_belongs_to_it():
    report = check_sft_data([{"messages": [user("Who?"), bot("Tobin.")]}], with_template_of("qwen3"))
    expected = len("<think>\n\n</think>\n\nTobin.") + 1
    assert f" {expected} tokens" in message(report, "supervision"), "a token each, and the end"


def test_a_call_of_a_tool_ends_with_a_token_of_its_own():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}"
        "{{ '<|call|>' if m.tool_calls else '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turns = [user("Who?"), bot("", tool_calls=[CALL]), {"role": "tool", "content": "1"}, bot("Tobin.")]
    assert check_sft_data([{"messages": turns}], tokenizer).codes == []


def test_a_turn_that_is_there_twice(tiny_tokenizer):
    question, answer = user("Who?"), bot("Tobin.")
    report = check_sft_data([{"messages": [question, answer, question, answer]}], tiny_tokenizer)
    assert report.codes == [] and " 14 tokens" in message(report, "supervision")


def test_an_earlier_answer_without_an_end(tmp_path):
    tokenizer = make_tiny_tokenizer()
    healthy = tokenizer.chat_template
    last_only = "{{ message['content'] }}{% if loop.last %}{{ '<|end|>' }}{% endif %}{% endgeneration %}"
    tokenizer.chat_template = healthy.replace("{{ message['content'] + '<|end|>' }}{% endgeneration %}", last_only)
    assert check_sft_data([{"messages": TALK}], tokenizer).codes == ["earlier_end_masked"]
    assert check_sft_data(CHATS, tokenizer).codes == []
    pair = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert check_sft_data([pair], tokenizer).codes == [], "earlier turns teach nothing here"
    # The end of an earlier answer is written by the turn that follows.
    late = "{% if not loop.first and message['role'] == 'user' %}{{ '<|end|>' }}{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for message in messages %}", f"{{% for message in messages %}}{late}"
    )
    trainer = sft_trainer(tmp_path, [{"messages": TALK}], tokenizer=tokenizer, assistant_only_loss=True)
    report = check_supervision(trainer)
    assert report.codes == ["earlier_end_masked"] and report.ok
    tokenizer.chat_template = healthy
    trainer = sft_trainer(tmp_path, [{"messages": TALK}], tokenizer=tokenizer, assistant_only_loss=True)
    assert check_supervision(trainer).codes == []


def unmarked(template):
    return re.sub(r"{%-? *(end)?generation *-?%}", "", template)


def marked_as(answer, end):
    """The tiny tokenizer with a template in which a {% generation %} block is written as `answer`, and what follows it as `end`."""
    tokenizer = make_tiny_tokenizer()
    written = "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    assert written in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(written, answer + end)
    return tokenizer


OPEN, CLOSE = "{%- generation -%}", "{%- endgeneration -%}"


@pytest.mark.parametrize(
    ("answer", "end", "codes", "tokens"),
    [
        (f"{OPEN}{{{{ message['content'] + '<|end|>' }}}}{CLOSE}", "", [], 21),
        (f"{OPEN}{{{{ message['content'] }}}}{CLOSE}", "<|end|>", ["end_masked"], 19),
        (f"{OPEN}{{{{ message['content'] }}}}{CLOSE}", "{{ '\n<|end|>' }}", ["no_end"], 19),
        (
            f"{OPEN}{{{{ message['content'] }}}}{{% if loop.last %}}<|end|>{{% endif %}}{CLOSE}",
            "{% if not loop.last %}<|end|>{% endif %}",
            ["earlier_end_masked"],
            20,
        ),
        (f"{{% if loop.last %}}{OPEN}{{{{ message['content'] }}}}<|end|>{CLOSE}{{% else %}}", "{{ message['content'] }}<|end|>{% endif %}", [], 14),
        ("{{ message['content'] }}<|end|>", f"{{% if false %}}{OPEN}{CLOSE}{{% endif %}}", ["no_loss"], 0),
    ],
)  # fmt: skip
def test_what_the_templates_markers_hold(answer, end, codes, tokens, tmp_path):
    """The labels are those of a trainer with assistant_only_loss=True."""
    tokenizer = marked_as(answer, end)
    report = check_sft_data([{"messages": TALK}], tokenizer)
    assert report.codes == codes and f" {tokens} tokens" in message(report, "supervision")
    if "no_loss" not in codes:
        trainer = sft_trainer(tmp_path, [{"messages": TALK}], tokenizer=tokenizer, assistant_only_loss=True)
        labels = trainer.train_dataset["labels"][0]
        assert sum(label != -100 for label in labels) == tokens
    pair = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert check_sft_data([pair], tokenizer).codes == [], "markers count for messages only"


@pytest.mark.parametrize(
    ("turns", "more", "words"),
    [
        ([user("Who?"), bot("", tool_calls=[CALL])], {}, "tool_calls"),
        (
            [user("Who?"), bot(None, tool_calls=[CALL]), {"role": "tool", "content": "1"}, bot("Tobin")],
            {},
            "tool_calls",
        ),
        ([user("Who?"), bot("Tobin", reasoning_content="Let me see.")], {}, "thoughts"),
        (TALK, {"tools": [CALL]}, "tools"),
        (TALK, {"tools": json.dumps([CALL])}, "tools"),
    ],
)
def test_what_the_template_leaves_out(turns, more, words):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "(message['content'] or '')")
    rows = [{"prompt": turns[:1], "completion": turns[1:], **more}, {"messages": turns, **more}]
    for entry in rows:
        report = check_sft_data([entry], tokenizer)
        assert report.codes == ["content_dropped"] and words in message(report, "content_dropped")
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
        + tokenizer.chat_template.replace(
            "(message['content'] or '')",
            "(message['reasoning_content'] or '') + (message['content'] or '') + ((message['tool_calls'] or '') | string)",
        )
    )
    for entry in rows:
        assert check_sft_data([entry], tokenizer).codes == []


def test_a_system_turn_that_is_left_out_and_one_that_moves(tiny_tokenizer):
    rows = [{"messages": [{"role": "system", "content": "Be short."}, *TALK]}]
    assert check_sft_data(rows, tiny_tokenizer).codes == []
    tokenizer = make_tiny_tokenizer()
    healthy = tokenizer.chat_template
    tokenizer.chat_template = healthy.replace("in messages", "in messages if message['role'] != 'system'")
    assert check_sft_data(rows, tokenizer).codes == ["content_dropped"]
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% else %}", "{% else %}{% if loop.index == 3 %}{{ messages[0]['content'] }}{% endif %}"
    )
    report = check_sft_data(rows, tokenizer)
    assert report.codes == [] and " 21 tokens" in message(report, "supervision")


def test_content_in_parts():
    tokenizer = make_tiny_tokenizer()
    parts = [{"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TALK]}]
    joined = "message['content'] if message['content'] is string else message['content'][0]['text']"
    healthy = tokenizer.chat_template
    for printed in ("(message['content'] | string)", "(message['content'] | tojson)"):
        tokenizer.chat_template = healthy.replace("message['content']", printed)
        assert check_sft_data(parts, tokenizer).codes == ["content_printed"]
    tokenizer.chat_template = healthy.replace("message['content']", f"({joined})")
    assert check_sft_data(parts, tokenizer).codes == []
    assert check_sft_data([{"messages": TALK}], tokenizer).codes == []


def test_a_template_that_rewrites_what_it_is_given():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "(message['content'] | upper)")
    report = check_sft_data([{"messages": TALK}], tokenizer)
    assert report.codes == [] and " 21 tokens" in message(report, "supervision"), "what the markers hold"
    tokenizer.chat_template = unmarked(tokenizer.chat_template)
    report = check_sft_data([{"messages": TALK}], tokenizer)
    assert report.codes == [] and " 14 tokens" in message(report, "supervision"), "the last answer's alone"
    tokenizer.chat_template = "{% for message in messages %}{{ 1 / message['content'] | length }}<|end|>{% endfor %}"
    assert check_sft_data([{"messages": [user("1"), bot("22")]}], tokenizer).codes == ["content_dropped"]


@pytest.mark.parametrize(
    "answer",
    ["Tobin.<|end|>", "Tobin.<|end|><|user|>And?", "<think>Well.<|end|></think>Tobin.", "Tobin.</s>", "A<|im_end|>B"],
)
def test_an_end_token_inside_an_answer(answer, tiny_tokenizer):
    report = check_sft_data([row(answer=answer), row()], tiny_tokenizer)
    assert report.codes == ["end_inside"] and report.ok
    assert re.search(r": (<\|(im_)?end\|>|</s>)\.$", message(report, "end_inside"))
    assert check_sft_data([row(question=answer), row(answer="<s>struck</s> out")], tiny_tokenizer).codes == []


@pytest.mark.parametrize(
    ("answer", "codes"),
    [("Tobin.<|end|>", []), ("Tobin.<|end|>\n", []), ("A<|end|><|user|>B", ["end_inside"]), ("A</s>", ["end_inside"])],
)
def test_an_end_token_in_plain_text(answer, codes, tiny_tokenizer):
    assert check_sft_data([{"prompt": "Who? ", "completion": answer}], tiny_tokenizer).codes == codes
    assert check_sft_data([{"text": f"Who? {answer}"}], tiny_tokenizer).codes == []


SPECIAL = re.compile(r"<\|[^|>\s]+\|>|<(?:start|end)_of_turn>|<｜[^｜]+｜>")
THINKING = [
    user("Who?"),
    bot("<think>\nWell.\n</think>\n\nTobin."),
    user("And?"),
    bot("<think>\nSo.\n</think>\n\nHanna."),
]


def with_template_of(name):
    """The tiny tokenizer with a published model's chat template, which TRL brings, and that model's special tokens."""
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(template)))})
    tokenizer.bos_token = "<|pad|>"
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3", "gemma3", "phi3", "gptoss"])
def test_templates_of_published_models(name):
    tokenizer = with_template_of(name)
    for rows in (ROWS, CHATS, [{"messages": TALK}], [{"messages": [{"role": "system", "content": "Hush."}, *TALK]}]):
        report = check_sft_data(rows, tokenizer)
        assert report.codes == [], report


def test_thoughts(tiny_tokenizer):
    qwen3, deepseek = with_template_of("qwen3"), with_template_of("deepseek_r1_distill")
    last_only = {"prompt": THINKING[:3], "completion": THINKING[3:]}
    for rows in ([last_only], [{"messages": THINKING[:2]}]):
        assert check_sft_data(rows, qwen3).codes == [], "what a model is not shown when asked needs no loss"
        report = check_sft_data(rows, deepseek)
        assert "content_dropped" in report.codes and "thoughts" in message(report, "content_dropped")
    assert check_sft_data([{"messages": THINKING}], qwen3).codes == ["thoughts_dropped"]
    assert check_sft_data([{"messages": THINKING}], tiny_tokenizer).codes == []


def test_a_tokenizer_without_offsets(tmp_path):
    tokenizer = ByT5Tokenizer(
        extra_ids=0, additional_special_tokens=["<|user|>", "<|assistant|>", "<|end|>"], eos_token="<|end|>"
    )
    tokenizer.chat_template = make_tiny_tokenizer().chat_template
    assert not tokenizer.is_fast
    report = check_sft_data([{"messages": TALK}], tokenizer)
    assert report.codes == [] and " 14 tokens" in message(report, "supervision"), "the last answer's alone"
    assert check_sft_data(ROWS, tokenizer).codes == []


@pytest.mark.parametrize("rows", [[], Dataset.from_list(ROWS).select([])])
def test_no_rows(rows, tiny_tokenizer):
    assert check_sft_data(rows, tiny_tokenizer).codes == ["empty"]


@pytest.mark.parametrize(
    "arguments", [(None,), (3,), ("data/reading",), ({"train": ROWS},), (ROWS, 0), (ROWS, "64"), (ROWS, True)]
)
def test_rows_that_are_no_rows(arguments, tiny_tokenizer):
    rows, *limit = arguments
    assert check_sft_data(rows, tiny_tokenizer, *limit).codes == ["bad_argument"]
    assert check_sft_data(ROWS, None).codes == ["bad_argument"]


# ------------------------------------------------------------------------------------------------ check_supervision


def test_healthy_trainers(tmp_path):
    trainer = sft_trainer(tmp_path)
    state = torch.random.get_rng_state()
    report = check_supervision(trainer)
    assert report.codes == [] and "In 12 rows" in message(report, "supervision")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert check_supervision(sft_trainer(tmp_path, PLAIN)).codes == []
    assert check_supervision(sft_trainer(tmp_path, CHATS, assistant_only_loss=True)).codes == []


def test_share_of_tokens_with_loss(tiny_tokenizer):
    batch = hand_made(tiny_tokenizer, ("abcde<|assistant|>", "f<|end|>"), ("abc<|assistant|>", "ghi<|end|>"))
    report = check_supervision(batch, tiny_tokenizer)
    assert report.codes == [] and "6 tokens, 38% of all" in message(report, "supervision")


def test_pad_is_eos_and_the_collator_masks_every_pad(tmp_path):
    tokenizer = make_tiny_tokenizer()
    assert "end_masked" not in check_supervision(plain_trainer(tmp_path, tokenizer)).codes
    tokenizer.pad_token = tokenizer.eos_token
    report = check_supervision(plain_trainer(tmp_path, tokenizer))
    assert "end_masked" in report.codes and "12 of 12" in message(report, "end_masked")
    assert check_supervision(sft_trainer(tmp_path, tokenizer=tokenizer)).codes == [], (
        "TRL goes by lengths, so it may be EOS"
    )


def test_end_of_turn_outside_the_generation_markers(tmp_path):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] + '<|end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|end|>' }}",
    )
    trainer = sft_trainer(tmp_path, CHATS, tokenizer=tokenizer, assistant_only_loss=True)
    assert check_supervision(trainer).codes == ["end_masked"]


def test_loss_on_the_prompt(tmp_path, tiny_tokenizer):
    for trainer in (
        sft_trainer(tmp_path, completion_only_loss=False),
        sft_trainer(tmp_path, CHATS),
        plain_trainer(tmp_path, tiny_tokenizer),
    ):
        report = check_supervision(trainer)
        assert report.codes == ["loss_on_prompt"] and "100% of all" in message(report, "supervision")
        assert report.ok, "it may be meant"


def test_truncated_answers(tmp_path):
    rows = [*ROWS, row(answer="Tobin" * 5)]
    assert check_supervision(sft_trainer(tmp_path, rows, max_length=60)).codes == []
    report = check_supervision(sft_trainer(tmp_path, rows, max_length=40))
    assert report.codes == ["truncated"] and "In 1 of 13 rows" in message(report, "truncated")
    # TRL drops the rows that have lost the whole answer, and here none is left.
    assert check_supervision(sft_trainer(tmp_path, rows, max_length=10)).codes == ["empty"]


def test_packed_rows(tmp_path, tiny_tokenizer):
    healthy = sft_trainer(tmp_path, packing=True, max_length=64, per_device_train_batch_size=2)
    assert len(healthy.train_dataset) < len(ROWS)
    report = check_supervision(healthy)
    assert report.codes == [] and "In 12 rows" in message(report, "supervision")
    everywhere = sft_trainer(tmp_path, packing=True, max_length=64, completion_only_loss=False)
    assert check_supervision(everywhere).codes == ["loss_on_prompt"]


def test_rows_packed_without_regard_to_their_ends(tmp_path):
    packed = {"packing": True, "packing_strategy": "wrapped", "max_length": 64, "per_device_train_batch_size": 2}
    report = check_supervision(sft_trainer(tmp_path, **packed))
    assert report.codes == ["wrapped_packing"] and not report.ok
    text = [{"text": "Tobin has the key. " * 9}] * 4
    plain = check_supervision(sft_trainer(tmp_path, text, **packed))
    assert plain.codes == ["wrapped_packing"] and plain.ok, "usual in pretraining"
    assert check_supervision(sft_trainer(tmp_path, packing_strategy="wrapped")).codes == [], "nothing is packed"


def test_rows_split_to_be_packed(tmp_path):
    packed = {"packing": True, "packing_strategy": "bfd_split", "max_length": 48, "per_device_train_batch_size": 2}
    assert check_supervision(sft_trainer(tmp_path, **packed)).codes == [], "no row is longer"
    rows = [*ROWS, row(answer="Tobin has it. " * 6), row(question="Who? " * 10)]
    report = check_supervision(sft_trainer(tmp_path, rows, **packed))
    assert report.codes == ["rows_split"] and report.ok and "at least 3:" in message(report, "rows_split")
    report = check_supervision(sft_trainer(tmp_path, rows, completion_only_loss=False, **packed))
    assert report.codes == ["rows_split", "loss_on_prompt"]


def test_pads_that_carry_loss(tiny_tokenizer):
    batch = hand_made(tiny_tokenizer, ("abc<|assistant|>", "de<|end|>"), ("abcdef<|assistant|>", "gh<|end|>"))
    cloned = batch | {"labels": torch.where(batch["labels"] == -100, batch["labels"], batch["input_ids"])}
    assert check_supervision(cloned, tiny_tokenizer).codes == []
    cloned["labels"][batch["attention_mask"] == 0] = tiny_tokenizer.pad_token_id
    report = check_supervision(cloned, tiny_tokenizer)
    assert report.codes == ["loss_on_pads"] and "In 1 of 2 rows" in message(report, "loss_on_pads")


def test_batches_made_by_hand(tiny_tokenizer):
    healthy = ("abc<|assistant|>", "de<|end|>")
    batch = hand_made(tiny_tokenizer, healthy, ("abcdef<|assistant|>", "gh<|end|>"))
    assert check_supervision(batch, tiny_tokenizer).codes == []
    unmasked = {name: entry for name, entry in batch.items() if name != "attention_mask"}
    assert check_supervision(unmasked, tiny_tokenizer).codes == []
    flipped = {
        name: entry.flip(1)
        for name, entry in hand_made(tiny_tokenizer, ("<|end|>ed", "<|tnatsissa|>cba"), healthy).items()
    }
    assert "no_end" in check_supervision(flipped, tiny_tokenizer).codes
    assert check_supervision(hand_made(tiny_tokenizer, healthy, ("abc", "de")), tiny_tokenizer).codes == ["no_end"]
    assert check_supervision(batch | {"labels": torch.full_like(batch["labels"], -100)}, tiny_tokenizer).codes == [
        "no_loss"
    ]
    shifted = batch["labels"].roll(-1, dims=1)
    assert "labels_shifted" in check_supervision(batch | {"labels": shifted}, tiny_tokenizer).codes
    assert check_supervision(unmasked.copy() | {"labels": 1}, tiny_tokenizer).ok is False
    del unmasked["labels"]
    assert check_supervision(unmasked, tiny_tokenizer).codes == ["no_labels"]


def test_rows_from_all_over_a_large_set_and_from_a_stream(tmp_path, tiny_tokenizer):
    trainer = sft_trainer(tmp_path)
    healthy = trainer.train_dataset[0]
    silent = healthy | {"labels": [-100] * len(healthy["labels"])}
    many = Dataset.from_list([healthy] * 100 + [silent] * 20)
    trainer.train_dataset = many
    report = check_supervision(trainer)
    assert report.codes == ["no_loss"] and "In 10 of 60 rows" in message(report, "no_loss")
    trainer.train_dataset = many.to_iterable_dataset()
    assert "In 64 rows" in message(check_supervision(trainer), "supervision")


@pytest.mark.parametrize("thing", [None, 3, "trainer", [], torch.zeros(2, 3)])
def test_neither_a_trainer_nor_a_batch(thing, tiny_tokenizer):
    assert check_supervision(thing, tiny_tokenizer).codes == ["bad_argument"]
    assert check_supervision({"input_ids": [[1]], "labels": [[1]]}).codes == ["bad_argument"]


# ------------------------------------------------------------------------------------------------ check_training


def test_healthy_training(tmp_path, tiny_tokenizer):
    for trainer in (sft_trainer(tmp_path, logging_steps=1), plain_trainer(tmp_path, tiny_tokenizer, logging_steps=1)):
        before = check_training(trainer)
        assert before.codes == [] and "0 steps" in message(before, "steps")
        report = check_training(trained(trainer))
        assert report.codes == [] and "4 weights looked at" in message(report, "moved")
        assert check_training(trainer.model).codes == []


def test_learning_rate_of_full_fine_tuning(tmp_path, tiny_tokenizer):
    assert check_training(sft_trainer(tmp_path, learning_rate=2e-5)).codes == ["rate_too_low"]
    full = sft_trainer(tmp_path, model=make_tiny_model(tiny_tokenizer), learning_rate=2e-5)
    assert check_training(full).codes == []
    assert check_training(sft_trainer(tmp_path, learning_rate=2e-5, optim="adafactor")).codes == []
    decayed = trained(sft_trainer(tmp_path, lr_scheduler_type="linear"))
    assert decayed.optimizer.param_groups[0]["lr"] == 0 and check_training(decayed).codes == []


def test_a_learning_rate_that_is_far_too_high(tmp_path, tiny_tokenizer):
    report = check_training(sft_trainer(tmp_path, learning_rate=0.2))
    assert report.codes == ["rate_too_high"] and report.ok
    assert check_training(sft_trainer(tmp_path, learning_rate=1.5e-2)).codes == []
    full = sft_trainer(tmp_path, model=make_tiny_model(tiny_tokenizer), learning_rate=0.2)
    assert check_training(full).codes == [], "the bound is LoRA's"
    assert check_training(sft_trainer(tmp_path, learning_rate=0.2, optim="sgd")).codes == []


def test_an_optimizer_of_ones_own_counts(tmp_path, tiny_tokenizer):
    model = get_peft_model(make_tiny_model(tiny_tokenizer), lora())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert (
        check_training(plain_trainer(tmp_path, tiny_tokenizer, model, (optimizer, None), learning_rate=1e-6)).codes
        == []
    )


def test_settings_of_trl_on_a_cpu(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="use_cpu"):
            SFTConfig(output_dir=str(tmp_path))
    trainer = sft_trainer(tmp_path, bf16=None, activation_checkpointing=None)
    report = check_training(trainer)
    assert report.codes == ["slow_on_cpu"] and "bf16 and activation_checkpointing" in message(report, "slow_on_cpu")


def test_b_unchanged_after_three_steps(tmp_path, tiny_tokenizer):
    model = make_tiny_model(tiny_tokenizer)
    early = torch.optim.AdamW(model.parameters(), lr=1e-3)  # made before the adapter was there
    trainer = trained(plain_trainer(tmp_path, tiny_tokenizer, get_peft_model(model, lora()), (early, None)))
    report = check_training(trainer)
    assert report.codes == ["not_moved"] and not report.ok and "4 of 4 weights" in message(report, "not_moved")
    assert check_training(trainer.model).codes == ["not_moved"]
    warming_up = trained(
        plain_trainer(tmp_path, tiny_tokenizer, max_steps=1, warmup_steps=5, lr_scheduler_type="linear")
    )
    assert check_training(warming_up).codes == [], "the first rate of a warm-up is 0"


def test_b_unchanged_in_one_layer(tiny_model):
    model = get_peft_model(tiny_model, lora())
    for name, weight in model.named_parameters():
        if "lora_B" in name and "layers.1.self_attn.v_proj" not in name:
            torch.nn.init.normal_(weight)
    report = check_training(model)
    assert report.ok and report.codes == ["not_moved"] and "1 of 4 weights" in message(report, "not_moved")


def move_B(model, pattern):
    for name, weight in model.named_parameters():
        if "lora_B" in name and re.search(pattern, name):
            torch.nn.init.normal_(weight)
    return model


def test_most_layers_unchanged(tiny_model):
    model = move_B(get_peft_model(tiny_model, lora(target_modules=["q_proj", "v_proj", "lm_head"])), "lm_head")
    report = check_training(model)
    assert report.codes == ["not_moved"] and not report.ok and "4 of 5 weights" in message(report, "not_moved")
    assert "checkpointing" not in message(report, "not_moved")


def test_towers_and_experts_may_rest(tiny_model):
    """Rows without images move nothing in a tower for images, and rows that no expert was asked about nothing in that."""
    for part in ("vision_tower", "experts"):
        tower = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(6)])
        setattr(tiny_model.model, part, tower)
        config = lora(target_modules=rf".*({part}\.\d|q_proj)", task_type=None)
        report = check_training(move_B(get_peft_model(copy.deepcopy(tiny_model), config), "q_proj"))
        assert report.codes == ["not_moved"] and report.ok and "6 of 8 weights" in message(report, "not_moved")
        assert not check_training(get_peft_model(copy.deepcopy(tiny_model), config)).ok


def train_a_little(model, tokenizer):
    batch = hand_made(tokenizer, ("abc<|assistant|>", "de<|end|>"))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    model.train()
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    ("reentrant", "hook", "codes"), [(True, False, ["not_moved"]), (True, True, []), (False, False, [])]
)
def test_checkpointing_that_passes_no_gradient_on(reentrant, hook, codes, tiny_tokenizer):
    base = make_tiny_model(tiny_tokenizer)
    model = get_peft_model(base, lora(target_modules=["q_proj", "v_proj", "lm_head"]))
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads() if hook else base.disable_input_require_grads()
    report = check_training(train_a_little(model, tiny_tokenizer))
    assert report.codes == codes
    if codes:
        remedy = next(finding.remedy for finding in report.findings if finding.code == "not_moved")
        assert not report.ok and "enable_input_require_grads()" in remedy
        assert "Gradient checkpointing is on" in message(report, "not_moved")


def test_an_adapter_in_16_bits(tmp_path, tiny_tokenizer):
    def adapted(dtype=torch.bfloat16, **options):
        return get_peft_model(make_tiny_model(tiny_tokenizer).to(dtype), lora(), **options)

    healthy = sft_trainer(tmp_path, model=adapted(), learning_rate=1e-4)
    assert check_training(healthy).codes == [], "PEFT makes it in 32 bits"
    for model in (adapted(autocast_adapter_dtype=False), adapted().to(torch.bfloat16), adapted().half()):
        report = check_training(sft_trainer(tmp_path, model=model, learning_rate=1e-4))
        assert report.codes == ["adapter_in_16_bits"] and report.ok
        assert "A step of the learning rate 0.0001 leaves" in message(report, "adapter_in_16_bits")
        assert "adapter_in_16_bits" in check_training(model).codes
    assert "adapter_in_16_bits" not in check_training(make_tiny_model(tiny_tokenizer).to(torch.bfloat16)).codes
    vera = get_peft_model(make_tiny_model(tiny_tokenizer), VeraConfig(target_modules=["q_proj"])).to(torch.bfloat16)
    assert "adapter_in_16_bits" in check_training(vera).codes
    in_4_bits = adapted(autocast_adapter_dtype=False)
    next(in_4_bits.parameters()).quant_state = object()
    assert check_training(sft_trainer(tmp_path, model=in_4_bits, learning_rate=1e-3)).codes == []
    assert check_training(sft_trainer(tmp_path, model=in_4_bits, learning_rate=1e-4)).codes == ["adapter_in_16_bits"]


def test_the_numbers_that_a_step_does_not_change():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.randn(4096).to(dtype)
        for step in (1e-2, 1e-3, 1e-4):
            stays = ((weight.float() + step).to(dtype) == weight) & ((weight.float() - step).to(dtype) == weight)
            assert abs(_too_small_a_step(weight, step) - int(stays.sum())) <= 40, "only powers of 2 have two distances"


def test_weights_from_before(tiny_tokenizer):
    model = get_peft_model(make_tiny_model(tiny_tokenizer), lora(init_lora_weights="olora"))
    assert check_training(model).codes == ["cannot_tell"], "B does not start at zero"
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_B" in name}
    assert check_training(model, before).codes == ["not_moved"]
    assert check_training(model, dict(model.named_parameters())).codes == ["cannot_tell"], "no copies"
    assert check_training(model, {"B": torch.zeros(2)}).codes == ["cannot_tell"]
    with torch.no_grad():
        for name in before:
            model.get_parameter(name).add_(1e-3)
    assert check_training(model, before).codes == []
    full = make_tiny_model(tiny_tokenizer)
    assert check_training(full).codes == ["cannot_tell"]


def test_a_learning_rate_that_makes_the_loss_nan(tmp_path):
    trainer = trained(sft_trainer(tmp_path, learning_rate=1e38, logging_steps=1))
    report = check_training(trainer)
    assert report.codes == ["rate_too_high", "not_finite"] and "lora_" in message(report, "not_finite")
    assert all(entry.get("loss", 0) == entry.get("loss", 0) for entry in trainer.state.log_history), "the log hides it"


def test_a_learning_rate_that_kills_the_gradient(tmp_path):
    """RMSNorm makes zeros of what overflows: no NaN anywhere, and the loss stays at ln(vocabulary) for good."""
    trainer = trained(sft_trainer(tmp_path, learning_rate=1e30, logging_steps=1))
    report = check_training(trainer)
    assert report.codes == ["rate_too_high", "no_gradient"] and "At step 2" in message(report, "no_gradient")


def test_nan_in_the_log_alone(tmp_path):
    trainer = sft_trainer(tmp_path)
    trainer.state.log_history = [{"loss": 2.0, "step": 1}, {"eval_loss": float("nan"), "step": 2}]
    report = check_training(trainer)
    assert report.codes == ["not_finite"] and "the loss" in message(report, "not_finite")


def test_nothing_to_train(tmp_path, tiny_tokenizer):
    frozen = get_peft_model(make_tiny_model(tiny_tokenizer), lora(inference_mode=True)).requires_grad_(False)
    prepared = prepare_model_for_kbit_training(get_peft_model(make_tiny_model(tiny_tokenizer), lora()))
    bare = make_tiny_model(tiny_tokenizer).requires_grad_(False)
    for model, words in (
        (frozen, "is_trainable=True"),
        (prepared, "prepare_model_for_kbit_training before"),
        (bare, "peft_config"),
    ):
        report = check_training(plain_trainer(tmp_path, tiny_tokenizer, model))
        assert report.codes == ["nothing_trainable"] and words in report.findings[0].remedy
    right = get_peft_model(prepare_model_for_kbit_training(make_tiny_model(tiny_tokenizer)), lora())
    assert check_training(plain_trainer(tmp_path, tiny_tokenizer, right)).codes == []


@pytest.mark.parametrize(("trainable", "codes"), [(True, []), (False, ["nothing_trainable"])])
def test_preferences_on_a_trained_adapter(trainable, codes, tmp_path, tiny_tokenizer):
    make_tiny_adapter(make_tiny_model(tiny_tokenizer)).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(make_tiny_model(tiny_tokenizer), tmp_path / "adapter", is_trainable=trainable)
    row = {"prompt": TALK[:1], "chosen": TALK[1:2], "rejected": [bot("Me.")]}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**settings(tmp_path, learning_rate=2e-4)),
        train_dataset=Dataset.from_list([row] * 4),
        processing_class=tiny_tokenizer,
    )
    assert "ref" in trainer.model.peft_config
    assert check_training(trainer).codes == codes
    assert check_adapters(trainer.model, expect_trainable=True).ok is trainable
    if not trainable:
        assert "is_trainable=True" in check_training(trainer).findings[0].remedy


@pytest.mark.parametrize("thing", [None, 3, "trainer", {}])
def test_nothing_to_look_at(thing, tiny_model):
    assert check_training(thing).codes == ["bad_argument"]
    assert check_training(tiny_model, before=[1]).codes == ["bad_argument"]


def test_only_the_first_special_token_after_an_answer_ends_it():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|><|assistant|>\n{% endfor %}"
    tokenizer.eos_token = None
    assert _ends(tokenizer) == {tokenizer.convert_tokens_to_ids("<|end|>")}
