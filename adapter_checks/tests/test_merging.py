"""Merging folder to folder: the same bits as PEFT, little memory, refusals in sentences, and nothing lost on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from adapter_checks import InputError, merging
from tiny_models import make_tiny_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def quiet_libraries():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("bases") / "base"
    make_tiny_model(tiny_tokenizer).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def adapt(base, folder, config=None, **changes):
    """An adapter with a random B, in a folder; without the copy of a head or embedding that PEFT would add to it."""
    torch.manual_seed(1)
    config = config or LoraConfig(
        **{"r": 8, "lora_alpha": 16, "target_modules": ALL, "task_type": "CAUSAL_LM"} | changes
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def adapter(base):
    return adapt(base, base.parent / "adapter")


def by_peft(base, adapter, dtype="auto"):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
    return model.merge_and_unload()


def same_bits(model, folder):
    """The weights of the files against those of a model in memory."""
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    wanted = model.state_dict()
    return stored.keys() <= wanted.keys() and all(
        tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]) for name, tensor in stored.items()
    )


def reconfigure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------ the same weights


@pytest.mark.parametrize("dtype", [None, "float32", torch.bfloat16, "float16"])
@pytest.mark.parametrize("merge", [merging.merge_by_shards, merging.merge_whole])
def test_the_bits_of_pefts_own_merge(merge, dtype, base, adapter, tmp_path):
    out = merge(base, adapter, tmp_path / "out", dtype=dtype)
    model = by_peft(base, adapter, dtype or "auto")
    assert out == tmp_path / "out" and same_bits(model, out)
    assert not same_bits(AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto"), out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == model.dtype and torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template


@pytest.mark.parametrize("base_dtype", ["bfloat16", "float16"])
def test_a_16_bit_base_keeps_its_dtype_or_changes_it(base_dtype, base, adapter, tiny_tokenizer, tmp_path):
    AutoModelForCausalLM.from_pretrained(base, dtype=base_dtype).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    for dtype in (None, "float32"):
        merging.merge_by_shards(tmp_path / "base", adapter, tmp_path / "out", dtype=dtype)
        assert same_bits(by_peft(tmp_path / "base", adapter, dtype or base_dtype), tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"layers.0.mlp.down_proj": 3}},
        {"use_rslora": True, "alpha_pattern": {".*proj": 3}, "target_modules": "all-linear"},
        {"target_modules": ["lm_head"], "init_lora_weights": "gaussian"},
    ],
    ids=["rslora", "patterns", "both", "head"],
)
def test_scalings_and_targets(changes, base, tmp_path):
    adapter = adapt(base, tmp_path / "adapter", **changes)
    merging.merge_by_shards(base, adapter, tmp_path / "out")
    assert same_bits(by_peft(base, adapter), tmp_path / "out")


def test_conv1d_and_a_base_saved_without_its_head(tiny_tokenizer, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer), n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    model.transformer.save_pretrained(tmp_path / "headless")
    # c_attn is 64 x 192, and one c_proj square: there only the module's type tells which way round it is.
    adapter = adapt(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn", "c_proj"])
    merging.merge_by_shards(tmp_path / "base", adapter, tmp_path / "out")
    merged = by_peft(tmp_path / "base", adapter)
    assert same_bits(merged, tmp_path / "out")

    tensors = load_file(tmp_path / "headless" / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(short, tmp_path / "headless" / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(tmp_path / "base" / "config.json", tmp_path / "headless" / "config.json")
    merging.merge_by_shards(tmp_path / "headless", adapter, tmp_path / "short")
    assert same_bits(merged.transformer, tmp_path / "short")


def test_shards_index_and_configuration(base, adapter, tiny_tokenizer, tmp_path):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "training_args.bin").write_bytes(b"pickle")
    for dtype in (None, "bfloat16"):
        out = merging.merge_by_shards(tmp_path / "base", adapter, tmp_path / "out", dtype=dtype)
        assert {file.name for file in out.iterdir()} == {file.name for file in (tmp_path / "base").iterdir()} - {
            "training_args.bin"
        }
        assert same_bits(by_peft(base, adapter, dtype or "auto"), out)
        loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and loaded.dtype == (torch.bfloat16 if dtype else torch.float32)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(p.numel() * p.element_size() for p in loaded.parameters())


def test_other_numbers_are_copied_and_every_tensor_lies_aligned(base, adapter, tmp_path):
    own = shutil.copytree(base, tmp_path / "base")
    extra = {"steps": torch.arange(3), "mask": torch.tensor([True, False, True]), "empty": torch.zeros(0)}
    extra["bytes"] = torch.tensor([1], dtype=torch.uint8)
    save_file(
        load_file(own / "model.safetensors") | extra, own / "model.safetensors", metadata={"format": "pt", "note": "é"}
    )
    out = merging.merge_by_shards(own, adapter, tmp_path / "out", dtype="bfloat16")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}
        for name in ("steps", "mask", "bytes"):
            assert torch.equal(file.get_tensor(name), extra[name]) and file.get_tensor(name).dtype == extra[name].dtype
        assert file.get_tensor("empty").numel() == 0


def test_the_adapters_own_tokenizer_wins(base, adapter, tiny_tokenizer, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(own)
    for merge in (merging.merge_by_shards, merging.merge_whole):
        assert (
            AutoTokenizer.from_pretrained(merge(base, own, tmp_path / "out")).chat_template == tokenizer.chat_template
        )


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "olora"}, "PEFT changes the base"),
        ({"init_lora_weights": "pissa"}, "PEFT changes the base"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "only those are merged by shards"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
    ids=["dora", "head", "bias", "olora", "pissa", "embedding", "tokens"],
)
def test_what_is_not_merged_by_shards_is_refused_in_a_sentence(changes, sentence, base, tmp_path):
    adapter = adapt(base, tmp_path / "adapter", **changes)
    with pytest.raises(InputError, match=sentence) as error:
        merging.merge_by_shards(base, adapter, tmp_path / "out")
    assert "merge_whole" in str(error.value) and not (tmp_path / "out").exists()
    assert merging.merge_to_folder(base, adapter, tmp_path / "whole") == "whole"


def test_a_setting_that_nobody_knows_yet_is_refused(base, adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "adapter")
    reconfigure(own, use_next_years_lora=True)
    with pytest.raises(InputError, match="does not handle use_next_years_lora=True"):
        merging.merge_by_shards(base, own, tmp_path / "out")
    reconfigure(own, use_next_years_lora=False)  # off
    merging.merge_by_shards(base, own, tmp_path / "out")


def test_a_copy_of_the_head_in_the_adapters_file_is_refused(base, adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "adapter")
    head = {"base_model.model.lm_head.base_layer.weight": torch.zeros(260, 64)}
    save_file(
        load_file(own / "adapter_model.safetensors") | head,
        own / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(InputError, match="lm_head.base_layer.weight, which is not a LoRA factor"):
        merging.merge_by_shards(base, own, tmp_path / "out")


def test_tied_quantised_and_other_bases_are_refused(base, adapter, tiny_tokenizer, tmp_path):
    tied = make_tiny_model(tiny_tokenizer)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    on_head = adapt(tmp_path / "tied", tmp_path / "on_head", target_modules=["lm_head"])
    with pytest.raises(InputError, match="lm_head.weight is tied to another weight"):
        merging.merge_by_shards(tmp_path / "tied", on_head, tmp_path / "out")

    quantised = shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(InputError, match="is quantised"):
        merging.merge_by_shards(quantised, adapter, tmp_path / "out")

    with pytest.raises(InputError, match="method is IA3"):
        config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
        merging.merge_by_shards(base, adapt(base, tmp_path / "ia3", config), tmp_path / "out")
    with pytest.raises(InputError, match="do not exist in this base"):
        small = make_tiny_model(tiny_tokenizer)
        small.model.layers, small.config.num_hidden_layers = small.model.layers[:1], 1
        small.save_pretrained(tmp_path / "small")
        merging.merge_by_shards(tmp_path / "small", adapter, tmp_path / "out")


def test_damaged_and_missing_things_are_named(base, adapter, tmp_path):
    def broken(source, name, size=1000):
        folder = shutil.copytree(source, tmp_path / name)
        file = next(folder.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:size])
        return folder

    for merge in (merging.merge_by_shards, merging.merge_whole, merging.merge_to_folder):
        for arguments, sentence in (
            ((base, broken(adapter, f"{merge.__name__}a")), "cut short"),
            ((broken(base, f"{merge.__name__}b"), adapter), "cut short"),
            ((base, tmp_path / "none"), "There is no folder"),
            ((None, adapter), "neither a folder nor a hub id"),
            ((adapter, adapter), "config.json|no model.safetensors"),
        ):
            with pytest.raises(InputError, match=sentence):
                merge(*arguments, tmp_path / "out")
        with pytest.raises(InputError, match="dtype is 'int8'"):
            merge(base, adapter, tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


def test_it_never_replaces_what_it_reads_or_lands_in_the_adapters_folder(base, adapter, tmp_path):
    for out in (base, adapter, base.parent):
        with pytest.raises(InputError, match="would replace the"):
            merging.merge_by_shards(base, adapter, out)
    with pytest.raises(InputError, match="is an adapter's folder"):
        merging.merge_by_shards(base, adapter, adapter / "merged")
    assert (adapter / "adapter_model.safetensors").exists() and (base / "model.safetensors").exists()


def test_numbers_that_overflow_are_refused(base, adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "adapter")
    reconfigure(own, lora_alpha=10**9)
    for merge in (merging.merge_by_shards, merging.merge_whole):
        with pytest.raises(InputError, match="NaN or infinity"):
            merge(base, own, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ memory

LARGE = 330e6  # bytes, in float32


@pytest.fixture(scope="module")
def large(tmp_path_factory, tiny_tokenizer):
    """A base of more than 300 MB, in shards, and an adapter on all of its linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), hidden_size=1024, intermediate_size=2560, num_hidden_layers=7,
                         num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.05, 0.05)
    model.save_pretrained(folder / "base", max_shard_size="100MB")
    tiny_tokenizer.save_pretrained(folder / "base")
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM", init_lora_weights=False)
    )
    model.save_pretrained(folder / "adapter")
    assert sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors")) > LARGE
    yield folder
    shutil.rmtree(folder)


# Waits for jobs and runs each in a fork of itself: the libraries, which take seconds to import, are there already.
SERVER = """
    import json, os, resource, sys, traceback, warnings
    warnings.simplefilter("ignore")
    import torch, transformers, peft, psutil, safetensors.torch
    from transformers import LlamaForCausalLM
    from adapter_checks import merging
    transformers.utils.logging.disable_progress_bar()

    def status(field):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    for line in sys.stdin:
        code, arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            names = globals() | dict(zip(("base", "adapter", "out", "rest"), arguments))
            try:
                names["print"] = lambda *words: print(json.dumps(words), flush=True)
                exec(code, names)
            except BaseException:
                print(json.dumps(traceback.format_exc()), flush=True)
            os._exit(0)
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"done": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}), flush=True)
"""


class Server:
    """Runs merges in a process of their own, whose memory and files can be limited, and which can be killed."""

    def __init__(self):
        # One thread: a fork has no other threads than the one that forked.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env=environment,
        )  # fmt: skip

    def start(self, code, base, adapter, out, rest=None) -> int:
        """The job's process id."""
        job = [textwrap.dedent(code), *map(str, (base, adapter, out)), rest]
        self.process.stdin.write(json.dumps([job[0], job[1:]]) + "\n")
        self.process.stdin.flush()
        self.said = []
        while not isinstance(line := json.loads(self.process.stdout.readline()), dict):
            self.said.append(line)
        return line["pid"]

    def finish(self) -> tuple[list, int]:
        """What the job printed, as lists of words, and its exit status."""
        while not isinstance(line := json.loads(self.process.stdout.readline()), dict):
            self.said.append(line)
        return self.said, line["done"]

    def run(self, *job) -> list:
        self.start(*job)
        said, status = self.finish()
        assert status == 0 and all(isinstance(words, list) for words in said), said
        return said


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.kill()
    server.process.communicate()


linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc, and limited in a way of Linux")
posix = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no fork, no SIGKILL and no limit on a file's size"
)


@linux
def test_peak_memory_by_shards_is_far_below_the_whole_models(large, base, adapter, server, tmp_path):
    code = """
        merge = getattr(merging, rest["merge"])
        merge(*rest["small"])  # so that the libraries' own pages are in memory
        before = status("VmHWM")
        merge(base, adapter, out)
        print(status("VmHWM") - before)
    """
    peaks = {}
    for name in ("merge_whole", "merge_by_shards"):
        small = [str(path) for path in (base, adapter, tmp_path / "small")]
        [[peaks[name]]] = server.run(
            code, large / "base", large / "adapter", large / name, {"merge": name, "small": small}
        )
    print(peaks)
    assert peaks["merge_whole"] > LARGE
    assert peaks["merge_by_shards"] < LARGE / 4
    whole, shards = (
        {name: tensor for file in (large / folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in peaks
    )
    assert whole.keys() == shards.keys() and all(torch.equal(tensor, shards[name]) for name, tensor in whole.items())


@linux
def test_where_memory_really_ends_the_merge_falls_back_to_shards(large, server):
    code = """
        limit = status("VmSize") + 250_000_000
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            merging.merge_whole(base, adapter, out)
            print("fitted")
        except Exception as error:
            print(merging.is_out_of_memory(error), os.path.exists(out))
            del error
        print(merging.merge_to_folder(base, adapter, out))
    """
    assert server.run(code, large / "base", large / "adapter", large / "fallback") == [[True, False], ["shards"]]
    files = [{file.name for file in (large / folder).glob("*.safetensors")} for folder in ("base", "fallback")]
    assert files[0] == files[1]


class SafetensorError(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:73] . DefaultCPUAllocator: not enough memory: you tried to allocate"
        ),
        OSError(12, "Cannot allocate memory"),
        SafetensorError("Error while serializing: I/O error: Cannot allocate memory (os error 12)"),
    ],
)
def test_the_fallback_knows_every_library_s_way_of_saying_it(error, base, adapter, tmp_path, monkeypatch):
    def too_large(*args, **kwargs):
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("while merging") from cause

    monkeypatch.setattr(merging, "merge_whole", too_large)
    assert merging.merge_to_folder(base, adapter, tmp_path / "out") == "shards"
    assert same_bits(by_peft(base, adapter), tmp_path / "out")


def test_other_errors_are_not_hidden_by_the_fallback(base, adapter, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(merging, "merge_whole", fail)
    with pytest.raises(RuntimeError, match="something else"):
        merging.merge_to_folder(base, adapter, tmp_path / "out")


def test_a_model_larger_than_the_memory_left_is_not_even_tried(base, adapter, tmp_path, monkeypatch):
    from types import SimpleNamespace

    size = (base / "model.safetensors").stat().st_size
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=int(0.7 * size)))
    with monkeypatch.context() as patch:
        patch.setattr(merging, "merge_whole", lambda *args, **kwargs: pytest.fail("it was tried"))
        assert merging.merge_to_folder(base, adapter, tmp_path / "out") == "shards"
        with pytest.raises(InputError, match="doesn't fit into memory.* use_dora=True"):
            merging.merge_to_folder(base, adapt(base, tmp_path / "dora", use_dora=True), tmp_path / "other")
    assert merging.merge_to_folder(base, adapter, tmp_path / "out", dtype="bfloat16") == "whole"


# ------------------------------------------------------------------------------------------------ kills and full disks


@pytest.fixture
def earlier(base, adapter, tmp_path):
    """An earlier merged folder, and the bytes of all its files."""
    folder = merging.merge_by_shards(base, adapter, tmp_path / "merged")
    (folder / "note.txt").write_text("mine")
    return folder, contents(folder)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def unfinished(folder):
    return [place for place in folder.parent.iterdir() if place.name.startswith(f".{folder.name}.")]


@posix
@pytest.mark.parametrize("merge", ["merge_by_shards", "merge_whole"])
@pytest.mark.parametrize("kill", ["SIGKILL", "SIGXFSZ"])
def test_a_kill_in_the_middle_of_saving_leaves_the_earlier_folder_whole(kill, merge, base, adapter, earlier, server):
    folder, before = earlier
    code = """
        import signal
        name, kill, size = rest
        if kill == "SIGKILL":  # when the weights are written, and the tokenizer isn't
            def write_and_die(*args, **kwargs):
                write(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            module, part = {
                "merge_whole": (transformers.modeling_utils, "safe_save_file"),
                "merge_by_shards": (merging, "_write_merged"),
            }[name]
            write = getattr(module, part)
            setattr(module, part, write_and_die)
        else:  # in the middle of the weights: the system ends a process that writes more than it may
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        getattr(merging, name)(base, adapter, out)
        print("it lived")
    """
    size = (base / "model.safetensors").stat().st_size
    server.start(code, base, adapter, folder, [merge, kill, size])
    assert server.finish() == ([], -getattr(signal, kill))
    (half,) = unfinished(folder)
    assert list(half.iterdir()) and not (half / "tokenizer.json").exists()  # it really was in the middle
    assert contents(folder) == before
    AutoModelForCausalLM.from_pretrained(folder)


@posix
def test_a_full_disk_leaves_the_earlier_folder_whole(base, adapter, earlier, server):
    folder, before = earlier
    code = """
        resource.setrlimit(resource.RLIMIT_FSIZE, (rest, rest))
        for merge in (merging.merge_by_shards, merging.merge_whole, merging.merge_to_folder):
            try:
                merge(base, adapter, out)
                print("nothing was raised")
            except merging.InputError as error:
                print(str(error))
    """
    said = server.run(code, base, adapter, folder, (base / "model.safetensors").stat().st_size // 2)
    assert len(said) == 3
    for (sentence,) in said:
        assert "no room" in sentence and str(folder) in sentence and "earlier result is unchanged" in sentence
    assert contents(folder) == before and unfinished(folder) == []


def test_a_merge_over_an_earlier_one_replaces_it_whole(base, adapter, earlier):
    folder, before = earlier
    merging.merge_by_shards(base, adapter, folder, dtype="bfloat16")
    assert not (folder / "note.txt").exists() and unfinished(folder) == []
    assert os.path.getsize(folder / "model.safetensors") < len(before["model.safetensors"])
