"""The page of recipes: each value has a source, and what can be computed or looked up here is right."""

import dataclasses
import re
from statistics import median

import pytest
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, LlamaConfig
from trl import DPOConfig, GRPOConfig, RewardConfig, RLOOConfig

from adapter_checks.counting import count_lora_parameters, meta_model
from adapter_checks.memory import estimate_memory
from course_utils import paths
from course_utils.data import load_results

PAGE = (paths.project_root() / "docs" / "recipes.md").read_text(encoding="utf-8")
LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)

# What each model's config.json says (hidden size, feed-forward size, layers, heads, heads of keys and values, vocabulary, tied embeddings), and how
# many parameters its files hold: a slip in one of the sizes would give another number.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
CONFIGS = {
    "Qwen2.5 0.5B": ("qwen2", (896, 4864, 24, 14, 2, 151936, True), 494_032_768),
    "Llama 3.2 1B": ("llama", (2048, 8192, 16, 32, 8, 128256, True), 1_235_814_400),
    "Qwen2.5 3B": ("qwen2", (2048, 11008, 36, 16, 2, 151936, True), 3_085_938_688),
    "Llama 3.2 3B": ("llama", (3072, 8192, 28, 24, 8, 128256, True), 3_212_749_824),
    "Mistral 7B v0.3": ("mistral", (4096, 14336, 32, 32, 8, 32768, False), 7_248_023_552),
    "Qwen2.5 7B": ("qwen2", (3584, 18944, 28, 28, 4, 152064, False), 7_615_616_512),
    "Llama 3.1 8B": ("llama", (4096, 14336, 32, 32, 8, 128256, False), 8_030_261_248),
    "Qwen3 8B": ("qwen3", (4096, 12288, 36, 32, 8, 151936, False), 8_190_735_360),
    "Phi-4": ("phi3", (5120, 17920, 40, 40, 10, 100352, False), 14_659_507_200),
    "Qwen2.5 14B": ("qwen2", (5120, 13824, 48, 40, 8, 152064, False), 14_770_033_664),
    "Qwen2.5 32B": ("qwen2", (5120, 27648, 64, 40, 8, 152064, False), 32_763_876_352),
    "Llama 3.1 70B": ("llama", (8192, 28672, 80, 64, 8, 128256, False), 70_553_706_496),
}  # fmt: skip
CARDS = (8, 12, 16, 24, 32, 40, 48, 80)  # GB


def memory_row(model):
    """The row of the page's table on memory that belongs to a model."""
    kind, sizes, parameters = CONFIGS[model]
    config = AutoConfig.for_model(kind, **dict(zip(SIZES, sizes)), max_position_embeddings=8192, pad_token_id=0)
    assert sum(weight.numel() for weight in meta_model(config).parameters()) == parameters
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    common = {"batch_size": 1, "sequence_length": 2048, "dtype": "bfloat16", "gradient_checkpointing": True}
    needs = (
        estimate_memory(config, "full", **common, moment_dtype="float32"),
        estimate_memory(config, "lora", lora, **common),
        estimate_memory(config, "qlora", lora, **common, double_quantization=True),
    )
    cells = [f"{parameters / 1e9:.2f}"]
    for need in needs:
        card = next((f"{size} GB" for size in CARDS if need.total <= 0.8e9 * size), "several")
        cells.append(f"{need.total / 1e9:.1f} · {card}")
    return [model, *cells]


def test_memory_by_model_is_what_the_configs_give():
    section = PAGE.split("### Memory by model\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [re.sub(r"\[(.+?)\]\[.+?\]", r"\1", row[0]) for row in rows] == list(CONFIGS)
    assert [row[1:] for row in rows] == [memory_row(model)[1:] for model in CONFIGS]


def recipes(page):
    """{(section, setting): (start, why, source)} of the tables that begin with a column of settings."""
    found, section, inside = {}, "", False
    for line in page.splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        inside = line.startswith("| Setting") or (inside and line.startswith("|"))
        if inside and not line.startswith(("| Setting", "| ---")):
            setting, *rest = (cell.strip() for cell in line.strip("|").split("|"))
            found[section, setting] = tuple(rest)
    return found


def faults(page):
    """Return what is wrong with the page's form: rows without a source, and links that lead nowhere."""
    told = []
    for place, cells in recipes(page).items():
        if len(cells) != 3 or not all(cells):
            told.append(f"{place}: a cell is empty")
        elif "][" not in cells[-1]:
            told.append(f"{place}: no source")
    defined = re.findall(r"^\[([\w-]+)\]: https://\S+$", page, re.M)
    used = set(re.findall(r"\]\[([\w-]+)\]", page))
    told += [f"{label}: no link" for label in sorted(used - set(defined))]
    told += [f"{label}: unused or twice" for label in sorted(defined) if label not in used or defined.count(label) > 1]
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall("^#+ (.+)$", page, re.M)
    }
    told += [f"{anchor}: no heading" for anchor in re.findall(r"\(#([\w-]+)\)", page) if anchor not in headings]
    return told


def measured_on_a_gpu(size, method):
    """The row of the page's table on measured runs, from their rows: the most of three peaks, and the range of the speeds."""
    rows = [row for row in load_results("real_sizes") if (row["size"], row["method"]) == (size, method)]
    peaks = [f"{max(row[name] for row in rows):.1f}" for name in ("predicted_gb", "peak_gb", "trl_peak_gb")]
    speeds = [
        f"{min(row[name] for row in rows):,.0f} to {max(row[name] for row in rows):,.0f}"
        for name in ("tokens_a_second", "trl_tokens_a_second")
    ]
    return [size, {"lora": "LoRA", "qlora": "QLoRA"}[method], *peaks, *speeds]


def rounded(cell):
    """A cell's numbers, speeds to the next hundred."""
    return re.sub(r"\d+,\d+", lambda found: f"{round(int(found[0].replace(',', '')), -2):,}", cell)


def test_what_was_measured_on_a_gpu_is_what_the_page_says():
    section = PAGE.partition("### Measure it on a GPU")[2].partition("\n## ")[0]
    written = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| \d.*", section, re.M)]
    pairs = [(size, method) for size in ("1B", "8B") for method in ("lora", "qlora")]
    assert written == [[rounded(cell) for cell in measured_on_a_gpu(*pair)] for pair in pairs]

    rows = load_results("real_sizes")
    assert {row["cpu"] for row in rows} == {"NVIDIA H200"} and "NVIDIA H200" in section
    off = max(abs(row["peak_gb"] / row["predicted_gb"] - 1) for row in rows)
    assert 0.03 < off < 0.04 and "right to 4%" in section
    for name in ("tokens_a_second", "trl_tokens_a_second"):
        lora, qlora = (
            median(row[name] for row in rows if (row["size"], row["method"]) == ("8B", method))
            for method in ("lora", "qlora")
        )
        assert 1.4 <= round(lora / qlora, 1) <= 1.7, "the page and decide.md name this range"
    saved = [row["peak_gb"] - row["trl_peak_gb"] for row in rows]
    assert 2.4 < min(saved) and max(saved) < 3.1, "about 3 GB less"


def test_every_value_has_a_source_and_every_link_a_target():
    assert faults(PAGE) == []
    assert len(recipes(PAGE)) > 40


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("| epochs | 1 |", "| epochs | |", "('DPO with LoRA', 'epochs'): a cell is empty"),
        ("[Lester et al.][lester], §3.1 |", "Lester et al. |", "('Prompt tuning', 'size at which it pays'): no source"),
        ("[ia3]: https", "[ia4]: https", "ia3: no link"),
        ("[ia3]: https", "[ia4]: https", "ia4: unused or twice"),
        ("### IA3", "### IA³", "ia3: no heading"),
    ],
)
def test_a_fault_of_form_is_found(old, new, fault):
    assert PAGE.count(old) == 1
    assert fault in faults(PAGE.replace(old, new))


def test_the_learning_rates_differ_by_the_factor_that_is_told():
    assert "at 5e-3 to 1.5e-2" in PAGE and "1e-4 to 2e-4" in PAGE
    assert f"a factor of {5e-3 / 2e-4:.0f} to {1.5e-2 / 1e-4:.0f}" in PAGE


@pytest.mark.parametrize(
    "section, setting, config, field, value",
    [
        ("DPO with LoRA", "learning rate, LoRA or QLoRA", DPOConfig, "learning_rate", "1e-6"),
        ("DPO with LoRA", "beta", DPOConfig, "beta", "0.1"),
        ("DPO with LoRA", "`max_length`, prompt and reply", DPOConfig, "max_length", "1024"),
        ("Reward models with LoRA", "learning rate", RewardConfig, "learning_rate", "1e-4"),
        ("GRPO with LoRA", "generations per prompt", GRPOConfig, "num_generations", "8"),
        ("GRPO with LoRA", "beta, the weight of the KL term", GRPOConfig, "beta", "0"),
        ("GRPO with LoRA", "`max_completion_length`", GRPOConfig, "max_completion_length", "512"),
        ("GRPO with LoRA", "temperature", GRPOConfig, "temperature", "1.0"),
    ],
)
def test_defaults_are_those_of_the_installed_trl(section, setting, config, field, value):
    assert defaults(config)[field] == float(value)
    start, why, _ = recipes(PAGE)[section, setting]
    assert re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.]*\w)", f"{start}; {why}")


def test_the_other_defaults_are_those_of_the_installed_trl():
    assert "2 generations per prompt and a beta of 0.05" in PAGE
    assert (defaults(RLOOConfig)["num_generations"], defaults(RLOOConfig)["beta"]) == (2, 0.05)
    assert defaults(DPOConfig)["truncation_mode"] == "keep_start", "the page says that the end is cut"


def defaults(config):
    return {field.name: field.default for field in dataclasses.fields(config)}


def test_the_memory_of_a_reference_is_computed_right():
    def gigabytes(size):
        return f"{size / 1e9:.2f} GB"

    count = count_lora_parameters(LLAMA_8B, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model, adapter = 2 * count.base, 4 * count.adapter
    for written in (
        f"{count.base:,} × 2 bytes = {gigabytes(model)}",
        f"{count.adapter:,} × 4 bytes = {gigabytes(adapter)}",
        f"at rank 128 eight times that, {gigabytes(128 // 16 * adapter)}",
        f"61,000 × 8 bytes = {61_000 * 8 / 1e6:.1f} MB",
        f"2 × {model / 1e9:.2f} = {gigabytes(2 * model)}",
        f"base, reward model, value model: {gigabytes(3 * model)}",
        f"policy, reference, reward model, value model: {gigabytes(4 * model)}",
    ):
        assert written in PAGE, written


@pytest.mark.parametrize(
    "peft_config, written",
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20), "20 × 4096 = "),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20), "20 × 32 layers × 2 × 1024 = "),
        (
            IA3Config(
                task_type="CAUSAL_LM",
                target_modules=["k_proj", "v_proj", "down_proj"],
                feedforward_modules=["down_proj"],
            ),
            "32 × (1024 + 1024 + 14336) = ",
        ),
    ],
    ids=["prompt tuning", "prefix tuning", "IA3"],
)
def test_prompt_methods_train_as_many_numbers_as_told(peft_config, written):
    model = get_peft_model(meta_model(LLAMA_8B, None), peft_config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"{written}{trained:,}" in PAGE


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.partition("## More devices and more tenants")[2], re.M | re.S)


def test_the_file_for_accelerate_is_one_that_it_reads(tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin

    (written,) = code_blocks("yaml")
    path = tmp_path / "fsdp.yaml"
    path.write_text(written)
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes, config.distributed_type) == (2, 16, "FSDP")
    known = {field.name for field in dataclasses.fields(FullyShardedDataParallelPlugin)}
    assert {name.removeprefix("fsdp_") for name in config.fsdp_config} - known - {"version", "offload_params"} == set()
    path.write_text(written + "fsdp_versoin: 2\n")
    with pytest.raises(ValueError, match="fsdp_versoin"):
        load_config_from_file(str(path))


def test_the_commands_of_torchrun_and_accelerate_are_ones_that_they_read():
    import shlex

    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    parsers = {"torchrun": get_args_parser(), "accelerate": launch_command_parser()}
    lines = [shlex.split(line) for block in code_blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [line for line in lines if line[0] in parsers]
    assert [line[0] for line in commands] == ["torchrun", "torchrun", "accelerate"]
    for program, *given in commands:
        options = parsers[program].parse_args(given[1:] if program == "accelerate" else given)
        assert options.training_script == "train.py"
    assert parsers["torchrun"].parse_args(commands[1][1:]).rdzv_endpoint == "host0:29500"
