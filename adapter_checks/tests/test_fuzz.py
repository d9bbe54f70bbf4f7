"""Mangled files and rows: each check answers with a report or an InputError, and foresaw what it met."""

import json
from datetime import timedelta

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapter_checks import InputError, check_adapter_folder, check_preference_data, check_sft_data, merging
from adapter_checks.model_folder import load_config, weight_files
from adapter_checks.names import plain_name, same_base
from adapter_checks.safetensors_header import read_safetensors_header
from architectures import ARCHITECTURES
from tiny_models import make_tiny_tokenizer

# The bound holds for one call on a slow and busy machine; a check of such files takes hundredths of a second.
LIMIT = timedelta(seconds=30)
fuzz = settings(
    max_examples=25,
    deadline=LIMIT,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**6)
    | st.floats()
    | st.sampled_from(["", "q_proj", "(", ".*", "all-linear", "LORA", "SEQ_CLS", "pissa", "a/b", "é\x00"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["q_proj", "*", "role", "content", ""]), inner, max_size=3)
    ),
    max_leaves=5,
)
SETTINGS = [
    "peft_type", "task_type", "auto_mapping", "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters", "layer_replication", "use_dora",
    "use_rslora", "lora_bias", "bias", "init_lora_weights", "trainable_token_indices", "ensure_weight_tying", "use_qalora",
    "use_bdlora", "qalora_group_size", "fan_in_fan_out", "base_model_name_or_path", "revision", "unheard_of",
]  # fmt: skip


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A base and an adapter, which each example mangles a copy of."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("fuzz")
    llama = ARCHITECTURES["Llama"]
    llama.make().save_pretrained(root / "base")
    model = get_peft_model(llama.make(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(root / "adapter")
    return root


def write(root, config, tensors):
    folder = root / "mangled"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder


def answer(check, *args):
    """What a check says; anything but a report or an InputError is an error of the test."""
    try:
        report = check(*args)
    except InputError as error:
        assert str(error).strip()
        return None
    assert str(report).strip() and "check_failed" not in report.codes, report
    return report


@fuzz
@given(changes=st.dictionaries(st.sampled_from(SETTINGS), JSON, min_size=1, max_size=3))
def test_mangled_configurations(changes, healthy):
    config = json.loads((healthy / "adapter" / CONFIG).read_text()) | changes
    folder = write(healthy, config, load_file(healthy / "adapter" / WEIGHTS))
    base = load_config(healthy / "base")
    answer(check_adapter_folder, folder, base)


@fuzz
@given(changes=st.dictionaries(st.sampled_from(SETTINGS), JSON, min_size=1, max_size=2))
def test_merging_with_mangled_configurations(changes, healthy):
    config = json.loads((healthy / "adapter" / CONFIG).read_text()) | changes
    folder = write(healthy, config, load_file(healthy / "adapter" / WEIGHTS))
    try:
        merging.merge_by_shards(healthy / "base", folder, healthy / "out")
    except InputError as error:
        assert str(error).strip()


@fuzz
@given(
    renamed=st.sampled_from(["lora_A", "lora_B.weight", ".weight", "base_model.model.", "layers.0", "self_attn", "q_proj", ""]),
    into=st.sampled_from(["", ".", "x", "lora_embedding_A", "lora_magnitude_vector", "layers.9", "module.", "modules_to_save", "é"]),
    shape=st.lists(st.integers(0, 3), max_size=4),
    kind=st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn]),
    number=st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
)  # fmt: skip
def test_mangled_tensors(renamed, into, shape, kind, number, healthy):
    tensors = {name.replace(renamed, into) or "x": t for name, t in load_file(healthy / "adapter" / WEIGHTS).items()}
    tensors[next(iter(tensors))] = torch.full(shape, number if kind.is_floating_point else 1.0).to(kind)
    folder = write(healthy, json.loads((healthy / "adapter" / CONFIG).read_text()), tensors)
    answer(check_adapter_folder, folder, load_config(healthy / "base"))


@fuzz
@given(place=st.integers(0, 900), content=st.binary(min_size=1, max_size=9), cut=st.integers(0, 2000))
def test_mangled_bytes(place, content, cut, healthy):
    folder = write(healthy, {}, load_file(healthy / "adapter" / WEIGHTS))
    for name in (CONFIG, WEIGHTS):
        whole = (healthy / "adapter" / name).read_bytes()
        (folder / name).write_bytes((whole[:place] + content + whole[place + len(content) :])[: len(whole) - cut])
    answer(check_adapter_folder, folder)
    try:
        assert isinstance(read_safetensors_header(folder / WEIGHTS), dict)
    except InputError as error:
        assert WEIGHTS in str(error)


@fuzz
@given(
    changes=st.dictionaries(
        st.sampled_from(["model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "dtype"]),
        JSON,
        min_size=1,
        max_size=2,
    )
)  # fmt: skip
def test_mangled_models(changes, healthy):
    if changes.get("vocab_size") or changes.get("hidden_size") or changes.get("num_hidden_layers"):
        changes = {name: min(value, 64) if isinstance(value, int) else value for name, value in changes.items()}
    base = healthy / "mangled base"
    base.mkdir(exist_ok=True)
    config = json.loads((healthy / "base" / "config.json").read_text()) | changes
    (base / "config.json").write_text(json.dumps(config))
    answer(check_adapter_folder, healthy / "adapter", base)


@fuzz
@given(index=JSON)
def test_mangled_indices(index, healthy):
    folder = healthy / "index"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    try:
        assert weight_files(folder)
    except InputError as error:
        assert "index" in str(error)


@fuzz
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["prompt", "completion", "messages", "text", "labels", "tools"]), JSON, max_size=3
        )
        | JSON,
        min_size=1,
        max_size=3,
    )
)
def test_mangled_rows(rows):
    answer(check_sft_data, rows, make_tiny_tokenizer())


REPLIES = st.sampled_from(
    ["Tobin", "", [{"role": "user", "content": "Who?"}], [{"role": "assistant", "content": "Tobin"}]]
)


@fuzz
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["prompt", "chosen", "rejected", "tools", "chat_template_kwargs"]),
            JSON | REPLIES,
            max_size=4,
        )
        | st.fixed_dictionaries({"prompt": REPLIES, "chosen": REPLIES, "rejected": REPLIES | JSON}),
        min_size=1,
        max_size=4,
    )
)
def test_mangled_pairs(rows):
    answer(check_preference_data, rows, make_tiny_tokenizer())


@fuzz
@given(one=st.text("/\\-._abé "), other=st.text("/\\-._ab4it"))
def test_odd_names(one, other):
    assert same_base(one, other) == same_base(other, one)
    assert same_base(one, one) and plain_name(plain_name(other)) == plain_name(other)
