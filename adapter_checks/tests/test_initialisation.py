"""A base that OLoRA or PiSSA changed is found, whatever its configuration says; starts that a layer can't have, too."""

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adapter_checks import check_adapter_folder, check_adapters, check_lora_config
from adapter_checks.initialisation import changes_base, check_shared, subtracted_initialisation
from adapter_checks.names import plain_name
from adapter_checks.report import Report


def make_base(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def lora(start, **changes):
    return LoraConfig(
        init_lora_weights=start,
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes,
    )


def trained(start, adapter_name="default", **changes):
    """An adapter whose A and B have moved by a third of their size."""
    torch.manual_seed(1)
    model = get_peft_model(make_base(), lora(start, **changes), adapter_name=adapter_name)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += torch.randn_like(weight) * (weight.std() / 3 if weight.any() else 0.1)
    return model.eval()


def quietly(call, *given, **named):
    with warnings.catch_warnings(action="ignore"):
        return call(*given, **named)


def message(report, code):
    return next(finding.message for finding in report.findings if finding.code == code)


@pytest.fixture(params=["olora", "pissa"])
def start(request):
    return request.param


@pytest.fixture
def folders(start, tmp_path):
    """`initial`, `plain` and `converted` of one adapter, and its model."""
    torch.manual_seed(1)
    get_peft_model(make_base(), lora(start)).save_pretrained(tmp_path / "initial")
    model = trained(start)
    model.save_pretrained(tmp_path / "plain")
    quietly(
        model.save_pretrained,
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    return model, tmp_path


def test_the_start_that_is_missing_is_named(start):
    report = check_adapters(get_peft_model(make_base(), lora(start)), original_base=make_base())
    assert report.ok and report.codes == ["start_taken_out"]
    wanted = {"olora": "OLoRA of rank 4 and scaling 2", "pissa": "PiSSA of rank 4"}[start]
    assert wanted in message(report, "start_taken_out") and "'default' gives it back" in message(
        report, "start_taken_out"
    )
    assert "layers.0.self_attn.q_proj" in str(report) and "base_model.model" not in str(report)


@pytest.mark.parametrize("rank, alpha", [(1, 1), (3, 12), (16, 8), (64, 64)])
def test_any_rank_and_scaling(rank, alpha):
    model = get_peft_model(make_base(), lora("olora", r=rank, lora_alpha=alpha))
    found = message(check_adapters(model, original_base=make_base()), "start_taken_out")
    assert f"OLoRA of rank {rank} and scaling {alpha / rank:.3g}" in found


def test_also_in_bfloat16(start):
    model = get_peft_model(make_base(torch.bfloat16), lora(start))
    assert check_adapters(model, original_base=make_base(torch.bfloat16)).codes == ["start_taken_out"]


def test_another_change_is_not_called_a_start():
    torch.manual_seed(2)
    weight = torch.randn(20, 12)
    assert subtracted_initialisation(weight, torch.randn(20, 12)) is None
    assert subtracted_initialisation(weight, torch.randn(20, 2) @ torch.randn(2, 12)) is None
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    assert subtracted_initialisation(weight, U[:, -2:] * S[-2:] @ Vh[-2:]) is None, (
        "the smallest directions are no start"
    )
    assert subtracted_initialisation(weight, U[:, :2] * S[:2] @ Vh[:2]) == "PiSSA of rank 2"


def test_unloaded_base_is_found_with_no_adapter_left(start):
    report = check_adapters(trained(start).unload(), original_base=make_base())
    assert report.codes == ["no_adapters", "start_taken_out"] and not report.ok
    untouched = check_adapters(make_base(), original_base=make_base())
    assert untouched.codes == ["no_adapters"] and "equal the original's" in str(untouched)


def test_an_adapter_beside_one_that_changed_the_base(folders):
    _, folder = folders
    trained(True).save_pretrained(folder / "other")
    for first, second in (("other", "plain"), ("plain", "other")):
        model = PeftModel.from_pretrained(make_base(), folder / first, adapter_name=first)
        quietly(model.load_adapter, folder / second, adapter_name=second)
        assert check_adapters(model).codes == ["start_not_shared"]
        report = check_adapters(model, original_base=make_base())
        assert set(report.codes) == {"start_not_shared", "start_taken_out"} and not report.ok
    model = PeftModel.from_pretrained(make_base(), folder / "other", adapter_name="other")
    model.load_adapter(folder / "converted", adapter_name="converted")
    assert check_adapters(model, original_base=make_base()).codes == []


def test_what_is_left_after_the_adapter_was_deleted(folders):
    _, folder = folders
    trained(True).save_pretrained(folder / "other")
    model = PeftModel.from_pretrained(make_base(), folder / "plain", adapter_name="plain")
    quietly(model.load_adapter, folder / "other", adapter_name="other")
    model.delete_adapter("plain")
    model.set_adapter("other")
    assert check_adapters(model).codes == [], "nothing to see without the original"
    report = check_adapters(model, original_base=make_base())
    assert report.codes == ["start_taken_out"] and not report.ok


def test_a_configuration_that_forgot_its_start(folders):
    _, folder = folders
    copied = shutil.copytree(folder / "plain", folder / "copied")
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": True}))
    loaded = PeftModel.from_pretrained(make_base(), copied)
    report = check_adapters(loaded, original_base=make_base())
    assert report.codes == ["start_missing"] and not report.ok
    assert check_adapters(loaded).codes == [], "nothing to see without the original"
    for healthy in ("plain", "converted"):
        report = check_adapters(PeftModel.from_pretrained(make_base(), folder / healthy), original_base=make_base())
        assert report.ok and "start_missing" not in report.codes


def test_plain_adapters_hold_no_start():
    for start in (True, "gaussian", "orthogonal"):
        assert check_adapters(trained(start), original_base=make_base()).codes == []


def test_a_folder_says_that_loading_it_changes_the_base(folders):
    _, folder = folders
    report = check_adapter_folder(folder / "plain")
    assert report.ok and report.codes == ["changes_base"]
    assert check_adapter_folder(folder / "converted").codes == []


@pytest.mark.parametrize(
    "config, expected",
    [
        (lora("olora"), []),
        (lora("pissa"), []),
        (lora("orthogonal"), []),
        (lora(True, r=7), []),
        (lora("orthogonal", r=7), ["odd_rank"]),
        (lora("orthogonal", rank_pattern={"q_proj": 3}), ["odd_rank"]),
        (lora("olora", r=65), ["rank_too_large"]),
    ],
)
def test_starts_on_linear_layers(config, expected):
    assert check_lora_config(make_base(), config).codes == expected


def test_starts_on_low_precision_and_on_quantised_weights():
    half = make_base(torch.bfloat16)
    assert check_lora_config(half, lora("olora")).codes == ["start_rounded"]
    assert check_lora_config(half, lora("orthogonal")).codes == [] == check_lora_config(half, lora(True)).codes
    quantised = make_base()
    for module in quantised.model.layers.modules():
        if isinstance(module, torch.nn.Linear):  # as in bitsandbytes: whole numbers
            module.weight = torch.nn.Parameter(torch.zeros(module.weight.shape, dtype=torch.int8), requires_grad=False)
    for start in ("olora", "pissa", "orthogonal"):
        assert check_lora_config(quantised, lora(start)).codes == ["start_quantised"]
    assert check_lora_config(quantised, lora(True)).codes == []


def test_conv1d():
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16, bos_token_id=1, eos_token_id=2)
    )
    for layer in ("c_attn", "attn.c_proj"):
        settings = {"target_modules": [layer], "fan_in_fan_out": True}
        assert check_lora_config(model, lora("olora", **settings)).codes == ["start_conv1d"]
        assert check_lora_config(model, lora("pissa", **settings)).codes == []


# ------------------------------------------------------------------------------------------------ what PEFT does


def prepare_corda(base, ids):
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = lora("corda", target_modules=["q_proj"], corda_config=CordaConfig())
    preprocess_corda(base, config, run_model=lambda: base(ids))
    return config


def prepare_lora_ga(base, ids):
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    config = lora("lora_ga", target_modules=["q_proj"], lora_ga_config=LoraGAConfig())
    preprocess_loraga(base, config, lambda: base(ids, labels=ids).loss.backward())
    return config


def rounded(weight, reduced_rank, **settings):
    """In the place of peft's `loftq_init`: the weight quantised, and A and B for what that lost."""
    return weight.round(decimals=1), torch.zeros(reduced_rank, weight.shape[1]), torch.zeros(len(weight), reduced_rank)


@pytest.mark.parametrize(
    "initialisation",
    [
        "olora",
        "pissa",
        "pissa_niter_4",
        "corda",
        "lora_ga",
        "loftq",
        "eva",
        "mica",
        "orthogonal",
        "gaussian",
        True,
        False,
    ],
)
def test_which_initialisations_change_the_base(initialisation, monkeypatch):
    """The list in this package against what the installed PEFT does to the base's weights."""
    base, ids = make_base(), torch.arange(1, 33)[None]
    prepare = {"corda": prepare_corda, "lora_ga": prepare_lora_ga}.get(initialisation)
    config = prepare(base, ids) if prepare else quietly(lora, initialisation if initialisation != "loftq" else True)
    if initialisation == "loftq":  # its quantiser needs scipy; that PEFT writes back what it returns is what counts
        config.init_lora_weights, config.loftq_config = "loftq", {"loftq_bits": 4, "loftq_iter": 1}
        monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", rounded)
    before = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    adapted = quietly(get_peft_model, base, config)
    after = {plain_name(name): weight for name, weight in adapted.named_parameters() if "lora_" not in name}
    changed = any(not torch.equal(weight, after[name]) for name, weight in before.items())
    assert changes_base(config) == changes_base({"init_lora_weights": initialisation}) == changed


@pytest.mark.parametrize("initialisation", ["corda", "lora_ga", "loftq"])
def test_no_two_adapters_share_a_base_that_one_of_them_changed(initialisation):
    report = Report("")
    check_shared(report, {"plain": lora(True), "changing": LoraConfig(init_lora_weights=True)})
    assert report.codes == []
    changing = lora(True)
    changing.init_lora_weights = initialisation
    check_shared(report, {"changing": changing})
    assert report.codes == []
    check_shared(report, {"plain": lora(True), "changing": changing})
    assert report.codes == ["start_not_shared"]
