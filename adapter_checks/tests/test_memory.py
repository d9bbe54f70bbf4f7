"""The memory estimate, against the tensors that real models and optimizers hold and against what autograd keeps."""

import pytest

from adapter_checks import InputError, counting, memory

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
BATCH, LENGTH = 3, 32


def make_config(kind="Llama", **options):
    import transformers

    own = {"Llama": {"tie_word_embeddings": True}, "OPT": {"ffn_dim": 256, "word_embed_proj_dim": 64}}.get(kind, {})
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **TOKENS, **options})


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})


def real_model(config, lora_config=None, dtype=None, attention=None):
    import torch
    import transformers
    from peft import get_peft_model

    torch.manual_seed(0)
    auto = "MaskedLM" if config.model_type == "bert" else "CausalLM"
    options = {"attn_implementation": attention} if attention else {}
    model = (
        getattr(transformers, f"AutoModelFor{auto}")
        .from_config(config, dtype=dtype or torch.float32, **options)
        .train()
    )
    return get_peft_model(model, lora_config) if lora_config else model


def loss_of(model, length=LENGTH):
    import torch

    ids = torch.randint(3, 256, (BATCH, length), generator=torch.Generator().manual_seed(0))
    options = {} if model.config.model_type == "bert" else {"use_cache": False}
    return model(input_ids=ids, labels=ids, **options).loss


def after_one_step(model, make_optimizer=None):
    """(weights, gradients, optimizer state) in bytes, as really held."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = (make_optimizer or torch.optim.AdamW)(trained, lr=1e-3)
    loss_of(model).backward()
    optimizer.step()
    return parts(memory.measure_training_state(model, optimizer))


def parts(estimate):
    return estimate.weights, estimate.gradients, estimate.optimizer


def estimate(config, method="full", lora_config=None, **options):
    return memory.estimate_memory(
        config, method, lora_config, **{"batch_size": BATCH, "sequence_length": LENGTH, **options}
    )


# ---------------------------------------------------------------------------------------------- weights, gradients, optimizer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", None),
        ("Llama", {}),
        ("Llama", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 16}}),
        ("GPT2", None),
        ("GPT2", {"target_modules": ["c_attn"], "bias": "all"}),
        ("OPT", {"target_modules": ["q_proj", "fc1"], "bias": "lora_only"}),
    ],
)
def test_prediction_is_what_is_held_after_a_step(kind, options, dtype):
    import torch

    config, lora_config = make_config(kind), None if options is None else lora(**options)
    predicted = parts(estimate(config, "full" if options is None else "lora", lora_config, dtype=dtype))
    held = after_one_step(real_model(config, lora_config, getattr(torch, dtype)))
    assert predicted == held
    # The comparison would see one more rank, or 4 bytes too few.
    if options is not None:
        assert parts(estimate(config, "lora", lora(**{**options, "r": 5}), dtype=dtype)) != held


@pytest.mark.parametrize("double", [False, True])
def test_prediction_of_qlora_is_what_is_held_after_a_step(double, tmp_path):
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config, lora_config = make_config(hidden_size=128), lora()
    real_model(config).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32)
    held = after_one_step(get_peft_model(model, lora_config).train())
    assert parts(estimate(model.config, "qlora", lora_config, double_quantization=double)) == held
    assert parts(estimate(config, "qlora", lora_config, double_quantization=double)) == held
    assert parts(estimate(config, "qlora", lora_config, double_quantization=not double)) != held


def test_prediction_of_8_bit_adamw_is_what_is_held_after_a_step():
    from bitsandbytes.optim import AdamW8bit

    config = make_config()
    assert any(p.numel() < 4096 for p in counting.meta_model(config).parameters())  # both kinds of state are there
    assert parts(estimate(config, optimizer="adamw_8bit")) == after_one_step(real_model(config), AdamW8bit)


def test_measurement_counts_what_is_there():
    import torch

    model = torch.nn.Linear(10, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    assert parts(memory.measure_training_state(model, optimizer)) == (220, 0, 0)
    model.tied = torch.nn.Parameter(model.weight.data)
    assert memory.measure_training_state(model).weights == 220
    del model.tied
    model(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert parts(memory.measure_training_state(model, optimizer)) == (220, 220, 2 * 220 + 2 * 4)


def test_parameter_that_the_loss_does_not_reach_has_no_gradient():
    import torch

    model = torch.nn.ModuleList([torch.nn.Linear(10, 5), torch.nn.Linear(10, 5)])
    model[0](torch.ones(1, 10)).sum().backward()
    assert memory.measure_training_state(model).gradients == 220


# ---------------------------------------------------------------------------------------------- the paper's figures


def llama_65b():
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64)


def test_full_fine_tuning_of_65b_needs_12_bytes_a_parameter():
    import torch

    config = llama_65b()
    numbers = sum(parameter.numel() for parameter in counting.meta_model(config).parameters())
    made_up_of = estimate(config, dtype="bfloat16", moment_dtype=torch.float32)
    assert made_up_of.weights == made_up_of.gradients == 2 * numbers
    assert made_up_of.optimizer == pytest.approx(8 * numbers, rel=1e-6)
    assert numbers == pytest.approx(65e9, rel=0.005) and 12 * 65e9 == 780e9  # the paper's "more than 780 GB"
    assert sum(parts(made_up_of)) == pytest.approx(780e9, rel=0.005)
    # torch's own AdamW keeps its moments in the parameter's dtype: 8 bytes a parameter.
    assert sum(parts(estimate(config, dtype="bfloat16"))) == pytest.approx(8 * numbers, rel=1e-6)


def test_bits_of_a_4_bit_number():
    model = counting.meta_model(llama_65b())
    sizes = [weight.numel() for weight in memory._quantised_weights(model)]
    linear = 80 * (4 * 8192 * 8192 + 3 * 8192 * 22016)
    assert sum(sizes) == linear  # neither embedding is among them
    for double, bits in ((False, 4.5), (True, 4 + 8 / 64 + 32 / (64 * 256))):
        measured = 8 * sum(memory._quantised(size, double) for size in sizes) / linear
        assert measured == pytest.approx(bits, abs=1e-3)


# ---------------------------------------------------------------------------------------------- activations


def kept_by_autograd(model, length=LENGTH):
    """Bytes of the tensors that one forward pass saves for the backward pass, parameters aside."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held on to, or a freed address would be seen again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model, length)
    return sum(storage.nbytes() for storage in kept.values())


TARGETS = {"Llama": ["q_proj", "v_proj"], "GPT2": ["c_attn"], "OPT": ["q_proj", "v_proj"], "Bert": ["query", "value"]}
CASES = [("full", None, 0.0), ("lora", "few", 0.0), ("lora", "all-linear", 0.1)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "factor"), [("Llama", 2), ("GPT2", 2.2), ("OPT", 2.2), ("Bert", 2.2)])
def test_activations_are_bounded_and_not_by_more_than_the_stated_factor(kind, factor, dtype):
    import torch

    length, factors = 96, {}
    for attention in ("sdpa", "eager"):
        config = make_config(kind, num_hidden_layers=2)
        config._attn_implementation = attention
        for method, targets, dropout in CASES:
            targets = TARGETS[kind] if targets == "few" else targets
            lora_config = lora(target_modules=targets, lora_dropout=dropout) if targets else None
            bound = estimate(config, method, lora_config, dtype=dtype, sequence_length=length).activations
            kept = kept_by_autograd(real_model(config, lora_config, getattr(torch, dtype), attention), length)
            factors[attention, method, dropout] = bound / kept
    assert all(1 <= value <= factor for value in factors.values()), factors


@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpointing_keeps_the_inputs_and_one_layer(method):
    lora_config = lora() if method == "lora" else None
    config, shorter = make_config(num_hidden_layers=5), make_config(num_hidden_layers=4)
    model = real_model(config, lora_config)
    without = kept_by_autograd(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    one_layer = without - kept_by_autograd(real_model(shorter, lora_config))  # recomputed, one after the other
    kept = kept_by_autograd(model) + one_layer
    bound = estimate(config, method, lora_config, gradient_checkpointing=True).activations
    assert kept < without and bound < estimate(config, method, lora_config).activations
    assert kept <= bound <= 2 * kept


def test_activations_are_not_estimated_for_what_the_formula_does_not_describe():
    import transformers

    t5 = transformers.T5Config(vocab_size=96, d_model=64, d_ff=160, num_layers=2, num_heads=4)
    for config in (t5, *map(make_config, ("Bart", "Mixtral", "Albert", "DebertaV2"))):
        assert estimate(config).activations is None, type(config)
    assert ("activations", "not estimated") in estimate(t5).rows()


# ---------------------------------------------------------------------------------------------- the estimate itself


def test_estimate_as_a_table():
    made = memory.MemoryEstimate(weights=1_500, gradients=999, optimizer=2_000_000, activations=3_000_000_000)
    assert made.total == 3_002_002_499
    assert made.rows() == [
        ("weights", "1.5 kB"), ("gradients", "999 B"), ("optimizer", "2.0 MB"), ("activations", "3.0 GB"), ("total", "3.0 GB"),
    ]  # fmt: skip
    assert str(made).splitlines()[0] == "weights             1.5 kB"
    assert memory.MemoryEstimate(1, 2, 3).total == 6


@pytest.mark.parametrize("architectures", [None, ["LlamaForCausalLM"]])
def test_config_stays_as_it_was(architectures):
    config = make_config(architectures=architectures)
    before = config.to_dict()
    estimate(config, dtype="bfloat16")
    assert config.to_dict() == before


def test_rows_longer_than_the_context():
    context = make_config().max_position_embeddings
    assert estimate(make_config(), sequence_length=context).warning == ""
    longer = estimate(make_config(), sequence_length=context + 1)
    assert f"context of {context:,}" in longer.warning and longer.warning in str(longer)
    assert [name for name, _ in longer.rows()] == ["weights", "gradients", "optimizer", "activations", "total"]


def test_full_fine_tuning_needs_no_adapter_and_ignores_one():
    assert estimate(make_config()) == estimate(make_config(), lora_config=lora())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("prefix", {}, "no method 'prefix'.*full, lora, qlora"),
        ("full", {"optimizer": "sgd"}, "no optimizer 'sgd'.*adamw"),
        ("full", {"batch_size": 0}, "batch_size is 0"),
        ("full", {"sequence_length": 1.5}, "sequence_length is 1.5"),
        ("full", {"dtype": "int8"}, "'int8' is no floating-point dtype"),
        ("full", {"dtype": "float23"}, "'float23' is no floating-point"),
        ("full", {"moment_dtype": "two"}, "'two' is no floating-point"),
        ("lora", {}, "needs a lora_config"),
        ("qlora", {"lora_config": {"r": 8}}, "must be a peft.LoraConfig"),
    ],
)
def test_bad_input_is_named(method, options, message):
    with pytest.raises(InputError, match=message):
        estimate(make_config(), method, **options)


def test_what_cannot_be_counted_cannot_be_estimated():
    with pytest.raises(InputError, match="finds no layer"):
        estimate(make_config(), "lora", lora(target_modules=["c_attn"]))
    with pytest.raises(InputError, match="model's config was expected"):
        estimate("org/model")
