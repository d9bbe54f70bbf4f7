"""Methods that are not LoRA: virtual tokens before the text (prompt, P-tuning, prefix), and IA3, VeRA and norms in the layers."""

import json
import math
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DataCollatorForLanguageModeling, GenerationConfig, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from adapter_checks import (
    check_adapter_folder,
    check_adapters,
    check_changes_output,
    check_merged_folder,
    check_supervision,
    check_training,
    compare_models,
    merging,
)
from adapter_checks.bitsandbytes_workarounds import quiet_imports
from adapter_checks.errors import InputError
from adapter_checks.generation import generate, padded
from architectures import ARCHITECTURES
from test_generation import PROMPTS, reference
from test_training_data import ROWS, message
from tiny_models import CPU_TRAINING, make_tiny_model, make_tiny_tokenizer

quiet_imports()

TASK = {"task_type": "CAUSAL_LM"}
VIRTUAL = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **TASK),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "projected prefix": lambda: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **TASK
    ),
}
IN_LAYERS = {
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK
    ),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj", "v_proj"], r=4, **TASK),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], **TASK),
}
METHODS = VIRTUAL | IN_LAYERS
EMBEDDED = ("prompt", "P-tuning")


def moved(model, scale=0.5):
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += scale * torch.randn_like(weight)
    return model.eval()


def adapted(name, base=None, scale=0.5):
    torch.manual_seed(0)
    base = make_tiny_model(make_tiny_tokenizer()) if base is None else base
    return moved(get_peft_model(base, METHODS[name]()), scale)


def saved(name, folder):
    adapted(name).save_pretrained(folder)
    return folder


def batch(tokenizer, side):
    tokenizer.padding_side = side
    return tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)


# ------------------------------------------------------------------------------------------------------------ batches
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_answered_like_each_row_alone(name):
    tokenizer = make_tiny_tokenizer()
    model = adapted(name)
    alone = [reference(model, tokenizer, prompt) for prompt in PROMPTS]
    assert len(set(alone)) > 2, "else equality proves nothing"
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == alone
    ids = [tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True) for p in PROMPTS]
    input_ids, mask = padded(model, tokenizer, [entry["input_ids"] for entry in ids], side="left")
    settings = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Position ids are not supported"
        found = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
    answers = tokenizer.batch_decode(found[:, input_ids.shape[1] :], skip_special_tokens=True)
    assert ([answer.strip() for answer in answers] == alone) == (name not in EMBEDDED), "PEFT's own generate"


@pytest.mark.parametrize("architecture", ["Qwen2", "Gemma 3", "GPT-2", "GPT-NeoX", "GPT-OSS"])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_batches_of_other_architectures(name, architecture, caplog):
    """GPT-2 learns positions, and the first and the last but one look through a window of 4 tokens or more."""
    tokenizer, kind = make_tiny_tokenizer(), ARCHITECTURES[architecture]
    sizes = kind.settings | {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    sizes |= {} if architecture == "GPT-2" else {"max_position_embeddings": 256}
    torch.manual_seed(0)
    base = getattr(transformers, kind.kind)(getattr(transformers, kind.config)(**sizes)).eval()
    model = adapted(name, base, scale=1.0)
    alone = [reference(model, tokenizer, prompt) for prompt in PROMPTS]
    assert len(set(alone)) > 1
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == alone


def test_generation_with_the_virtual_tokens_off(tiny_tokenizer):
    base = generate(make_tiny_model(tiny_tokenizer), tiny_tokenizer, PROMPTS, max_new_tokens=8)
    for name in VIRTUAL:
        model = adapted(name)
        assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8) != base
        with model.disable_adapter():
            assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=8) == base


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_take_their_part_of_the_context(name, tiny_tokenizer):
    model = adapted(name)
    longest = 256 - 3 - 4 - 3  # of the context, less the template's tokens, the new ones and the virtual ones
    assert generate(model, tiny_tokenizer, ["a" * longest], max_new_tokens=4)
    with pytest.raises(InputError, match="with 3 virtual and 4 new ones it exceeds the model's context of 256"):
        generate(model, tiny_tokenizer, ["a" * (longest + 1)], max_new_tokens=4)
    assert generate(make_tiny_model(tiny_tokenizer), tiny_tokenizer, ["a" * (longest + 1)], max_new_tokens=4)


@pytest.mark.parametrize("name", METHODS)
def test_what_no_batch_can_mix(name, tiny_tokenizer):
    """PEFT 0.21 answers each row with the active adapter, or fails in `generate`, where these methods are asked to mix."""
    model = adapted(name)
    model.add_adapter("second", METHODS[name]())
    with pytest.raises(InputError, match="can't mix adapters of [A-Z]"):
        generate(model, tiny_tokenizer, ["a", "b"], adapter_names=["default", "second"])
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]]).repeat(2, 1)
        mixed = model(input_ids=ids, adapter_names=["default", "second"]).logits
    assert torch.equal(mixed[0], mixed[1]), "the fault itself"


def test_prompts_that_depend_on_the_rows_task(tiny_tokenizer):
    multitask = peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=2, **TASK)
    with pytest.raises(InputError, match="task_ids"):
        generate(get_peft_model(make_tiny_model(tiny_tokenizer), multitask), tiny_tokenizer, ["a"])


# ---------------------------------------------------------------------------------------------------------- comparing
@pytest.mark.parametrize("name", METHODS)
def test_outputs_are_compared_and_the_side_of_the_pads_does_not_matter(name):
    model, tokenizer = adapted(name), make_tiny_tokenizer()
    right, left = (batch(tokenizer, side) for side in ("right", "left"))
    reports = [check_changes_output(model, inputs) for inputs in (right, left)]
    assert all(report.codes == [] and report.max_abs > 0.1 for report in reports)
    assert reports[0].max_abs == pytest.approx(reports[1].max_abs, rel=1e-3)
    assert compare_models(adapted(name), model, left).codes == []
    assert compare_models(adapted(name, scale=0.6), model, left).codes == ["logits_differ"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_each_row_is_compared_without_its_pads(name):
    """A function that embeds, prepends and adds positions by hand agrees with the model; PEFT on a left-padded batch does not."""
    model, inputs = adapted(name), batch(make_tiny_tokenizer(), "left")

    def by_hand(input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, model.config.vocab_size)
        for row, mask in enumerate(attention_mask.bool()):
            text = model.word_embeddings(input_ids[row, mask])
            embedded = torch.cat([model.get_prompt(1)[0], text])[None]
            logits[row, mask] = model.get_base_model()(inputs_embeds=embedded).logits[0, 3:]
        return logits

    with torch.no_grad():
        assert compare_models(by_hand, model, inputs).codes == []

        def padded_as_it_is(**given):
            return model(**given).logits[:, 3:]

        assert compare_models(by_hand, padded_as_it_is, inputs).codes == ["logits_differ"]


@pytest.mark.parametrize("architecture", ["BERT classifier", "BERT tokens", "T5"])
def test_models_that_give_other_things_than_logits_of_each_token(architecture):
    kind = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = moved(get_peft_model(kind.make(), peft.PromptTuningConfig(num_virtual_tokens=3, task_type=kind.task)))
    ids = kind.example()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    report = check_changes_output(model, ids, mask)
    assert report.codes == [] and report.max_abs > 0.01
    assert compare_models(model, model, ids, mask).codes == ["same_object"]


def test_positions_may_be_given(recwarn):
    for name in VIRTUAL:
        inputs = batch(make_tiny_tokenizer(), "left")
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert check_changes_output(adapted(name), inputs).codes == []
    assert not [entry for entry in recwarn if "Position ids" in str(entry.message)]


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_that_are_off_or_gone(name):
    model, inputs = adapted(name), batch(make_tiny_tokenizer(), "right")
    with model.disable_adapter():
        assert check_changes_output(model, inputs).codes == ["adapters_disabled"]
        assert check_adapters(model).codes == ["adapters_disabled"]
        assert check_adapters(model, expect_active=[]).codes == []
    assert check_changes_output(model, inputs).codes == []
    model.delete_adapter("default")
    assert check_changes_output(model, inputs).codes == ["no_adapters"]
    assert check_adapters(model).codes == ["no_adapters"]


# ------------------------------------------------------------------------------------------------------ loaded models
@pytest.mark.parametrize("name", METHODS)
def test_a_healthy_adapter_in_a_model(name, tmp_path, tiny_tokenizer):
    assert check_adapters(adapted(name), expect_trainable=True, expect_active="default").codes == []
    saved(name, tmp_path)
    model = PeftModel.from_pretrained(make_tiny_model(tiny_tokenizer), tmp_path)
    report = check_adapters(
        model, expect_active="default", original_base=make_tiny_model(tiny_tokenizer), folder=tmp_path
    )
    assert report.codes == [] and {"as_saved", "base_untouched"} <= {finding.code for finding in report.findings}
    assert compare_models(adapted(name), model, batch(tiny_tokenizer, "right")).codes == []


@pytest.mark.parametrize("name", VIRTUAL)
def test_faults_of_virtual_tokens_in_a_model(name, tmp_path, tiny_tokenizer):
    saved(name, tmp_path)
    model = PeftModel.from_pretrained(make_tiny_model(tiny_tokenizer), tmp_path)
    assert check_adapters(model, expect_active="sailor").codes == ["not_loaded"]
    assert check_adapters(model, base_name="other").codes == []  # this base has no name of its own
    assert check_adapters(model, expect_trainable=False).codes == ["adapter_trainable"], "PEFT 0.21 loads it so"
    model.prompt_encoder.requires_grad_(False)
    assert check_adapters(model, expect_trainable=False).codes == []
    assert check_adapters(model, expect_trainable=True).codes == ["adapter_frozen"]
    model.get_base_model().lm_head.requires_grad_(True)
    assert check_adapters(model).codes == ["base_trainable"]
    model.get_base_model().lm_head.requires_grad_(False)
    model.prompt_encoder["default"].embedding.weight.data[0, 0] += 1
    assert check_adapters(model, folder=tmp_path).codes == ["not_as_saved"]
    model.prompt_encoder["default"].embedding.weight.data[0, 0] = math.nan
    assert check_adapters(model).codes == ["non_finite"]
    other = make_tiny_model(tiny_tokenizer, seed=1)
    assert check_adapters(adapted(name), original_base=other).codes == ["base_changed"]


def test_the_second_of_two_prompts(tiny_tokenizer):
    model = adapted("prompt")
    model.add_adapter("second", METHODS["prompt"]())
    assert check_adapters(model, expect_active="second").codes == ["not_active"]
    model.set_adapter("second")
    assert check_adapters(model, expect_active="second").codes == []


# ------------------------------------------------------------------------------------------------------------ folders
def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def reconfigure(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", METHODS)
def test_a_healthy_folder(name, tmp_path, tiny_tokenizer):
    saved(name, tmp_path)
    assert check_adapter_folder(tmp_path).codes == []
    report = check_adapter_folder(tmp_path, make_tiny_model(tiny_tokenizer))
    assert report.codes == [] and ("3 virtual tokens" in str(report)) == (name in VIRTUAL)


@pytest.mark.parametrize("name", METHODS)
def test_folders_with_faults(name, tmp_path, tiny_tokenizer):
    folder = saved(name, tmp_path / "adapter")

    def spoilt(change, base=None, **config):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        rewrite(copy, change)
        reconfigure(copy, **config)
        return check_adapter_folder(copy, base).codes

    def whole(tensors):
        return tensors

    assert spoilt(whole) == []
    assert spoilt(lambda tensors: {name: tensor * math.nan for name, tensor in tensors.items()}) == ["non_finite"]
    assert spoilt(lambda tensors: {}) == ["empty"]
    base = make_tiny_model(tiny_tokenizer)
    if name in VIRTUAL:
        assert spoilt(whole, num_virtual_tokens=4) == ["shape_mismatch"]
        assert spoilt(whole, num_virtual_tokens=None) == ["bad_config"]
        assert spoilt(whole, task_type=None) == ["bad_config"]
        assert spoilt(lambda tensors: {"embedding.weight": tensors["prompt_embeddings"]}) == ["missing_tensors"]
    else:
        first = min(load_file(folder / "adapter_model.safetensors"))
        missing = spoilt(lambda tensors: {name: t for name, t in tensors.items() if name != first}, base)
        assert missing == ["layers_not_covered"]
        strange = spoilt(lambda tensors: {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()}, base)
        assert set(strange) == {"layer_not_in_base", "layers_not_covered"}
        gpt2 = ARCHITECTURES["GPT-2"].make()
        assert spoilt(whole, gpt2) == ["does_not_fit"], "it has none of these layers"
    base.config.hidden_size, base.config.num_attention_heads, base.config.num_key_value_heads = 128, 4, 4
    base.config.head_dim = 32
    assert spoilt(whole, transformers.LlamaForCausalLM(base.config)) == ["shape_mismatch"]


def test_virtual_tokens_that_fill_the_context(tmp_path, tiny_tokenizer):
    config = peft.PromptTuningConfig(num_virtual_tokens=256, **TASK)
    get_peft_model(make_tiny_model(tiny_tokenizer), config).save_pretrained(tmp_path)
    assert check_adapter_folder(tmp_path).codes == []
    assert check_adapter_folder(tmp_path, make_tiny_model(tiny_tokenizer)).codes == ["beyond_context"]


@pytest.mark.parametrize("name", ["IA3", "VeRA"])
def test_a_folder_that_was_saved_before_training(name, tmp_path, tiny_tokenizer):
    get_peft_model(make_tiny_model(tiny_tokenizer), METHODS[name]()).save_pretrained(tmp_path)
    assert check_adapter_folder(tmp_path).codes == ["untrained"]


def test_a_method_that_is_not_looked_at(tmp_path, tiny_tokenizer):
    config = peft.LoHaConfig(target_modules=["q_proj"], r=2)
    get_peft_model(make_tiny_model(tiny_tokenizer), config).save_pretrained(tmp_path)
    assert check_adapter_folder(tmp_path, make_tiny_model(tiny_tokenizer)).codes == ["not_lora"]


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_can_not_be_merged(name, tmp_path, tiny_tokenizer):
    for folder in ("base", "merged"):
        make_tiny_model(tiny_tokenizer).save_pretrained(tmp_path / folder)
        tiny_tokenizer.save_pretrained(tmp_path / folder)
    saved(name, tmp_path / "adapter")
    report = check_merged_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert report.codes == ["not_mergeable"] and "virtual tokens" in message(report, "not_mergeable")
    for merge in (merging.merge_to_folder, merging.merge_by_shards, merging.merge_whole):
        with pytest.raises(InputError, match="nothing to merge"):
            merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------- training
def sft_trainer(folder, peft_config, rows=ROWS, tokenizer=None, **changes):
    tokenizer = tokenizer or make_tiny_tokenizer()
    settings = CPU_TRAINING | {"output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "no"}  # fmt: skip
    return SFTTrainer(
        make_tiny_model(tokenizer),
        args=SFTConfig(**settings | {"learning_rate": 0.5} | changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_healthy_training(name, tmp_path):
    trainer = sft_trainer(tmp_path, METHODS[name](), learning_rate=0.4)
    before = {
        name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad
    }
    allowed = {"rate_too_high"} if name in IN_LAYERS else set()
    assert set(check_training(trainer).codes) <= allowed and check_supervision(trainer).codes == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert set(check_training(trainer, before).codes) <= allowed
    told = check_training(trainer).codes
    assert ("cannot_tell" in told) == (name in VIRTUAL), "the first values of virtual tokens are drawn"
    assert "moved" in {finding.code for finding in check_training(trainer, before).findings}


@pytest.mark.parametrize("name", IN_LAYERS)
def test_a_training_that_moves_nothing(name, tiny_tokenizer):
    torch.manual_seed(0)
    model = get_peft_model(make_tiny_model(tiny_tokenizer), METHODS[name]())
    assert check_training(model).codes == ["not_moved"]
    assert check_training(moved(model)).codes == []


@pytest.mark.parametrize("name", VIRTUAL)
def test_packing_and_checkpointing_with_virtual_tokens(name, tmp_path):
    packed = check_training(sft_trainer(tmp_path, METHODS[name](), packing=True, max_length=64))
    assert "packed_prompt" in packed.codes and not packed.ok
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = sft_trainer(tmp_path, METHODS[name](), activation_checkpointing=True)
    fails = "prefix" in name
    assert ("checkpointed_prefix" in check_training(trainer).codes) == fails
    if fails:
        with pytest.raises(RuntimeError, match="size"):
            trainer.train()


def test_a_rate_at_which_the_virtual_tokens_stay_where_they_are(tmp_path):
    report = check_training(sft_trainer(tmp_path, VIRTUAL["prompt"](), learning_rate=2e-4))
    assert report.codes == ["rate_too_low"] and report.ok
    assert "0.0006 at most" in message(report, "rate_too_low")


@pytest.mark.parametrize("name", METHODS)
def test_pads_between_the_virtual_tokens_and_the_text(name, tmp_path, tiny_tokenizer):
    for side in ("right", "left"):
        tokenizer = make_tiny_tokenizer()
        tokenizer.padding_side = side
        chats = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True) for row in ROWS]
        trainer = Trainer(
            adapted(name),
            args=TrainingArguments(**{key: value for key, value in CPU_TRAINING.items() if key != "activation_checkpointing"}, output_dir=str(tmp_path)),
            train_dataset=Dataset.from_list([dict(chat) for chat in chats]),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            processing_class=tokenizer,
        )  # fmt: skip
        expected = name in VIRTUAL and side == "left"
        assert ("pads_before_text" in check_supervision(trainer).codes) == expected


@pytest.mark.parametrize("name", VIRTUAL)
def test_rows_that_fit_the_context_only_without_virtual_tokens(name, tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "a" * 240}],
        "completion": [{"role": "assistant", "content": "Tobin"}],
    }
    healthy = sft_trainer(tmp_path, METHODS[name](), rows=[row] * 4)
    assert check_supervision(healthy).codes == []
    row["prompt"][0]["content"] += "a" * 5
    report = check_supervision(sft_trainer(tmp_path, METHODS[name](), rows=[row] * 4))
    assert report.codes == ["beyond_context"] and "3 virtual tokens" in message(report, "beyond_context")
    assert check_supervision(sft_trainer(tmp_path, IN_LAYERS["norms"](), rows=[row] * 4)).codes == []
