"""The checks for fine-tuning: each passes on a healthy trainer, model or row, and finds the fault that is planted."""

import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from adapter_checks import check_sft_data, check_supervision, check_training
from adapter_checks.bitsandbytes_workarounds import quiet_imports
from adapter_checks.training_data import _ends
from tiny_models import CPU_TRAINING, make_tiny_model, make_tiny_tokenizer

quiet_imports()
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


def row(question="Who has the key?", answer="Tobin"):
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


ROWS = [row(f"Who has key {number}?", "Tobin" + "!" * (number % 3)) for number in range(12)]
PLAIN = [{"prompt": "Who has the key? ", "completion": "Tobin"}] * 3
CHATS = [{"messages": entry["prompt"] + entry["completion"]} for entry in ROWS]


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
    "rows", [ROWS, Dataset.from_list(ROWS), PLAIN, CHATS, [{"text": "Tobin has the key."}], iter(ROWS)]
)
def test_healthy_rows(rows, tiny_tokenizer):
    report = check_sft_data(rows, tiny_tokenizer, 64)
    assert report.codes == [] and "carry loss" in message(report, "supervision")


def test_rows_are_tokenised_as_trl_does_it(tmp_path, tiny_tokenizer):
    for rows in (ROWS, PLAIN):
        expected = sum(
            label != -100 for entry in sft_trainer(tmp_path, rows).train_dataset["labels"] for label in entry
        )
        assert f" {expected} tokens" in message(check_sft_data(rows, tiny_tokenizer), "supervision")


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
        ("Who has the key? Tobin", "bad_row"),
        (None, "bad_row"),
        (row(answer="Tobin" * 12), "truncated"),
        (row(question="Who? " * 20), "no_loss"),
    ],
)
def test_a_bad_row_is_found_and_numbered(bad, code, tiny_tokenizer):
    report = check_sft_data([row(), bad, row()], tiny_tokenizer, 64)
    assert (
        report.codes == [code] and "In 1 of 3 rows" in message(report, code) and "(number 1)" in message(report, code)
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
    assert report.codes == ["not_finite"] and "lora_" in message(report, "not_finite")
    assert all(entry.get("loss", 0) == entry.get("loss", 0) for entry in trainer.state.log_history), "the log hides it"


def test_a_learning_rate_that_kills_the_gradient(tmp_path):
    """RMSNorm makes zeros of what overflows: no NaN anywhere, and the loss stays at ln(vocabulary) for good."""
    trainer = trained(sft_trainer(tmp_path, learning_rate=1e30, logging_steps=1))
    report = check_training(trainer)
    assert report.codes == ["no_gradient"] and "At step 2" in message(report, "no_gradient")


def test_nan_in_the_log_alone(tmp_path):
    trainer = sft_trainer(tmp_path)
    trainer.state.log_history = [{"loss": 2.0, "step": 1}, {"eval_loss": float("nan"), "step": 2}]
    report = check_training(trainer)
    assert report.codes == ["not_finite"] and "the loss" in message(report, "not_finite")


def test_nothing_to_train(tmp_path, tiny_tokenizer):
    model = get_peft_model(make_tiny_model(tiny_tokenizer), lora(inference_mode=True)).requires_grad_(False)
    assert check_training(plain_trainer(tmp_path, tiny_tokenizer, model)).codes == ["nothing_trainable"]


@pytest.mark.parametrize("thing", [None, 3, "trainer", {}])
def test_nothing_to_look_at(thing, tiny_model):
    assert check_training(thing).codes == ["bad_argument"]
    assert check_training(tiny_model, before=[1]).codes == ["bad_argument"]


def test_only_the_first_special_token_after_an_answer_ends_it():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|><|assistant|>\n{% endfor %}"
    tokenizer.eos_token = None
    assert _ends(tokenizer) == {tokenizer.convert_tokens_to_ids("<|end|>")}
