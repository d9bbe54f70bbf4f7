"""The command: each subcommand, its exit status, its JSON, and what it says when it can't run."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_checks import __version__, command
from adapter_checks.command import main

TOP = {"schema": int, "version": str, "command": str, "title": str, "ok": bool, "findings": list, "measured": dict}


@pytest.fixture
def folders(tiny_folders, tmp_path, monkeypatch):
    """A healthy set in the working directory, whose path has a space and an accent."""
    copied = shutil.copytree(tiny_folders, tmp_path / "my modèles")
    monkeypatch.chdir(copied)
    return copied


@pytest.fixture
def run(capsys):
    def run(*arguments):
        """(exit status, stdout, stderr)"""
        status = main([str(argument) for argument in arguments])
        written = capsys.readouterr()
        assert "Traceback" not in written.err
        return status, written.out, written.err

    return run


def as_json(out):
    content = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {key: type(value) for key, value in content.items()} == TOP
    assert content["schema"] == 1 and content["version"] == __version__
    assert all(set(finding) == {"level", "code", "message", "remedy"} for finding in content["findings"])
    return content


def codes(content):
    return [finding["code"] for finding in content["findings"] if finding["level"] != "ok"]


def spoil(folder, change):
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def write_rows(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def row(question="Where?", answer="Here."):
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


# ------------------------------------------------------------------------------------------------ subcommands


def test_folder(folders, run):
    status, out, err = run("folder", "adapter", "--base", "base")
    assert (status, err) == (0, "") and "LoRA of rank 4" in out
    spoil(folders / "adapter", lambda tensors: [t.zero_() for n, t in tensors.items() if "lora_B" in n])
    status, out, _ = run("folder", folders / "adapter", "--json")
    content = as_json(out)
    assert status == 1 and not content["ok"] and codes(content) == ["zero_b"] and content["command"] == "folder"


def test_folder_against_its_base(folders, run):
    spoil(folders / "adapter", lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers.1" in n])
    assert run("folder", "adapter")[0] == 0
    for base in ("base", "base/config.json"):
        status, out, _ = run("folder", "adapter", "--base", base, "--json")
        assert status == 1 and codes(as_json(out)) == ["layers_not_covered"]


def test_merged(folders, run):
    rows = write_rows(folders / "rows.jsonl", row(), row("Who?", "Ada é"))
    (folders / "texts.txt").write_text("One line.\n\nAnother line.\n")
    status, out, err = run("merged", "base", "adapter", "merged", "--rows", rows, "--texts", "texts.txt", "--json")
    measured = as_json(out)["measured"]
    assert (status, err) == (0, "") and measured["times"] == pytest.approx(1, abs=0.01)
    assert set(measured) == {"max_abs", "top1_agreement", "kl", "tolerance", "times", "rounding", "dtype", "scores"}
    assert measured["dtype"] == "float32" and set(measured["scores"]) == {"adapter", "merged"}


def test_merged_with_a_fault(folders, run):
    spoil(folders / "merged", lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].zero_())
    status, out, _ = run("merged", "base", "adapter", "merged", "--device", "cpu", "--dtype", "float32")
    assert status == 1 and "[FAIL]" in out and "up_proj" in out


def test_merged_takes_several_adapters(folders, run):
    shutil.copytree("adapter", "second")
    status, out, _ = run("merged", "base", "adapter", "second", "merged", "--json")
    assert status == 1 and as_json(out)["measured"]["times"].keys() == {"adapter", "second"}


def test_data(folders, run):
    rows = write_rows(folders / "rows.jsonl", row(), row(answer="é"))
    status, out, err = run("data", rows, "--model", "base", "--max-length", 64)
    assert (status, err) == (0, "") and "In 2 rows" in out
    write_rows(rows, row(), row(answer=""), row(answer="long " * 40))
    status, out, _ = run("data", rows, "--model", "base", "--max-length", 64, "--json")
    assert status == 1 and codes(as_json(out)) == ["no_completion", "truncated"]
    rows.write_text(f"\n{json.dumps(row())}\n\n{json.dumps(row(answer=''))}\n", encoding="utf-8")
    status, out, _ = run("data", rows, "--model", "base")
    assert status == 1 and "In 1 of 2 rows" in out and "(line 4)" in out, "lines of the file, empty ones among them"


def test_data_of_preference_pairs(folders, run):
    pairs = [{"prompt": [{"role": "user", "content": f"Where is key {number}?"}], "chosen": row()["completion"],
              "rejected": row(answer="There.")["completion"]} for number in range(2)]  # fmt: skip
    rows = write_rows(folders / "rows.jsonl", *pairs)
    status, out, err = run("data", rows, "--model", "base", "--max-length", 64)
    assert (status, err) == (0, "") and "2 pairs." in out
    rows = write_rows(rows, pairs[0], pairs[1] | {"rejected": pairs[1]["chosen"]}, row())
    status, out, _ = run("data", rows, "--model", "base", "--json")
    assert status == 1 and codes(as_json(out)) == ["bad_row", "identical_pairs"], (
        "the first row says what the others are"
    )


def test_run_on_preferences(folders, run):
    first = {
        "step": 1,
        "loss": 0.69,
        "rewards/margins": 0.03,
        "rewards/accuracies": 0.6,
        "rewards/chosen": float("nan"),
    }
    for values, beta, status, found in (
        ({"rewards/chosen": 0.03}, (), 0, []),
        ({"rewards/chosen": 0.03}, ("--beta", 0.01), 1, ["reference_differs"]),
        ({}, (), 1, ["not_finite"]),
    ):
        (folders / "trainer_state.json").write_text(json.dumps({"log_history": [first | values]}))
        for path in (".", "trainer_state.json"):
            given, out, err = run("run", path, *beta, "--json")
            assert (given, err, codes(as_json(out))) == (status, "", found)


def test_count(folders, run):
    status, out, _ = run("count", "base", "--rank", 2, "--target-modules", "q_proj", "down_proj")
    assert status == 0 and "in 4 adapted layers" in out and "down_proj" in out
    for model in ("base", "base/config.json", folders / "base"):
        status, out, _ = run("count", model, "--rank", 2, "--target-modules", ".*(q|v)_proj", "--json")
        measured = as_json(out)["measured"]
        assert status == 0 and measured["adapter"] == measured["trainable"] == 2 * 2 * 2 * (64 + 64)
        assert [layer["name"] for layer in measured["layers"]] == ["q_proj", "v_proj"]
        assert sum(layer["parameters"] for layer in measured["layers"]) == measured["adapter"]


def test_memory(folders, run):
    sizes = {}
    for method in ("full", "lora", "qlora"):
        status, out, _ = run("memory", "base", "--method", method, "--batch-size", 2, "--sequence-length", 32, "--json")
        assert status == 0
        sizes[method] = as_json(out)["measured"]["bytes"]
        assert (
            sum(sizes[method][part] for part in ("weights", "gradients", "optimizer", "activations"))
            == sizes[method]["total"]
        )
    assert (
        sizes["full"]["optimizer"] > sizes["lora"]["optimizer"] and sizes["qlora"]["weights"] < sizes["lora"]["weights"]
    )
    status, out, _ = run("memory", "base", "--gradient-checkpointing", "--dtype", "float32")
    assert status == 0 and "lora, 1 × 1024 tokens, float32, adamw, gradient checkpointing" in out and "total" in out
    assert "1,024 tokens are longer than the model's context of 256" in out
    findings = as_json(run("memory", "base", "--sequence-length", 257, "--json")[1])["findings"]
    assert [finding["code"] for finding in findings] == ["beyond_context"]
    assert as_json(run("memory", "base", "--sequence-length", 256, "--json")[1])["findings"] == []


def test_memory_on_several_devices(folders, run):
    status, out, _ = run("memory", "base", "--devices", 2, "--strategy", "fsdp", "--sequence-length", 32)
    assert status == 0 and ", each of 2 devices with fsdp" in out and "all_gather" in out and "buffers" in out
    found = {}
    for strategy in ("ddp", "fsdp"):
        options = ("--devices", 4, "--strategy", strategy, "--sequence-length", 32, "--json")
        found[strategy] = as_json(run("memory", "base", *options)[1])["measured"]
    assert found["fsdp"]["bytes"]["weights"] < found["ddp"]["bytes"]["weights"] / 3
    assert set(found["ddp"]["collectives"]) == {"all_reduce"} and found["ddp"]["sent"] < found["fsdp"]["sent"]
    alone = as_json(run("memory", "base", "--sequence-length", 32, "--json")[1])["measured"]
    assert (alone["collectives"], alone["sent"]) == ({}, 0) and "buffers" not in alone["bytes"]


def test_memory_takes_each_option_with_the_method_that_it_means(folders, run):
    rank = [
        "--method",
        "lora",
        "--rank",
        4,
        "--alpha",
        8,
        "--target-modules",
        "q_proj",
        "--bias",
        "all",
        "--task-type",
        "CAUSAL_LM",
    ]
    for options in (rank, ["--method", "qlora", "--double-quantization"], ["--method", "full"]):
        assert run("memory", "base", *options)[0] == 0


@pytest.mark.parametrize(("device", "status"), [("cpu", 0), ("cuda", 0 if torch.cuda.is_available() else 2)])
def test_a_device_that_this_torch_has_or_not(device, status, folders, run):
    found, _, err = run("merged", "base", "adapter", "merged", "--device", device)
    assert found == status and ("can't use the device 'cuda'" in err) == (status == 2)


def test_a_file_that_may_not_be_read_is_no_fault_of_the_adapter(folders, run, monkeypatch):
    from pathlib import Path

    opened = Path.open

    def refuse(path, *given, **named):
        if path.name == "adapter_model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *given, **named)

    monkeypatch.setattr(Path, "open", refuse)
    status, out, err = run("folder", "adapter", "--json")
    assert status == 2 and "Permission denied" in err and codes(as_json(out)) == ["not_readable"]


def test_a_saved_classifier_on_the_base_that_has_no_head(folders, run):
    """What PEFT writes into each saved configuration is no fault of it, and the base's folder names its own class."""
    path = folders / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text()) | {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    path.write_text(json.dumps(content | {"inference_mode": True}))
    status, out, _ = run("config", "base", path, "--json")
    assert status == 0 and codes(as_json(out)) == []


def test_config(folders, run):
    assert run("config", "base", "adapter")[0] == 0
    path = folders / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"target_modules": ["q_proj", "w_proj"], "rank_patern": {"q_proj": 2}}))
    status, out, _ = run("config", "base/config.json", path, "--learning-rate", 2e-5, "--json")
    assert status == 1 and codes(as_json(out)) == ["rate_too_low", "matches_nothing", "unknown_settings"]


# ------------------------------------------------------------------------------------------------ could not be run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["folder", "nowhere"], "no folder nowhere"),
        (["folder", ""], "not a path"),
        (["folder", "base/config.json"], "is a file"),
        (["folder", "adapter", "--base", "nowhere"], "no folder or file nowhere"),
        (["folder", "adapter", "--base", "adapter"], "no config.json"),
        (["folder", "base/adapter"], "no folder base/adapter"),  # a hub id by its form, but `base` is a folder here
        (["merged", "base", "adapter", "nowhere"], "no folder nowhere"),
        (["merged", "base", "adapter", "merged", "--rows", "nothing.jsonl"], "nothing.jsonl can't be read: No such file"),
        (["merged", "base", "adapter", "merged", "--rows", "empty.jsonl"], "empty.jsonl is empty"),
        (["merged", "base", "adapter", "merged", "--texts", "empty.jsonl"], "empty.jsonl is empty"),
        (["merged", "base", "adapter", "merged", "--rows", "good.jsonl"], "Row 1 of 1 is {'text': "),
        (["merged", "base", "adapter", "merged", "--dtype", "float3"], "no floating-point type"),
        (["merged", "base", "adapter", "merged", "--device", "toaster"], "toaster"),
        (["data", "nothing.jsonl", "--model", "base"], "nothing.jsonl can't be read"),
        (["data", "base", "--model", "base"], "Is a directory"),
        (["data", "bad.jsonl", "--model", "base"], "Line 3 of bad.jsonl is not JSON"),
        (["data", "list.jsonl", "--model", "base"], "Line 1 of list.jsonl is a list"),
        (["data", "latin.jsonl", "--model", "base"], "not text in UTF-8"),
        (["data", "good.jsonl", "--model", "adapter"], "no tokenizer"),
        (["count", "nowhere"], "no folder or file nowhere"),
        (["count", "adapter"], "no config.json"),
        (["count", "bad.jsonl"], "can't be read as JSON"),
        (["count", "strange.json"], "not a configuration that transformers can read"),
        (["count", "base", "--target-modules", "w_proj"], "finds no layer"),
        (["count", "base", "--target-modules", "(q"], "PEFT refuses"),
        (["count", "base", "--task-type", "CHAT"], "no task type 'CHAT'"),
        (["memory", "base", "--dtype", "float3"], "no floating-point dtype"),
        (["memory", "base", "--method", "full", "--rank", 4, "--bias", "none"], "--rank, --bias has no meaning with --method full"),
        (["memory", "base", "--method", "full", "--double-quantization"], "--double-quantization has no meaning"),
        (["memory", "base", "--strategy", "fsdp"], "--strategy has no meaning with one device"),
        (["memory", "base", "--double-quantization"], "--double-quantization has no meaning with --method lora"),
        (["merged", "base", "adapter", "merged", "--device", "xpu:7"], "can't use the device 'xpu:7' here"),
        (["run", "nowhere"], "no file nowhere"),
        (["run", "base"], "no file base"),
        (["run", "strange.json"], "strange.json has no log_history"),
        (["run", "sft.json"], "This is a log with loss, step, and not of DPOTrainer"),
        (["run", "sft.json", "--beta", 0], "a beta above 0"),
        (["config", "base", "nowhere.json"], "no file nowhere.json"),
        (["config", "base", "ia3.json"], "a configuration for IA3"),
        (["config", "base", "wrong.json"], "PEFT refuses wrong.json"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)  # fmt: skip
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_what_could_not_be_run(arguments, words, options, folders, run):
    (folders / "sft.json").write_text('{"log_history": [{"loss": 2.0, "step": 1}]}')
    (folders / "good.jsonl").write_text('{"text": "a"}\n')
    (folders / "empty.jsonl").write_text("\n")
    (folders / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    (folders / "list.jsonl").write_text("[1]\n")
    (folders / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    (folders / "strange.json").write_text('{"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}')
    (folders / "ia3.json").write_text('{"peft_type": "IA3"}')
    (folders / "wrong.json").write_text('{"peft_type": "LORA", "layers_to_transform": 1, "target_modules": "a"}')
    status, out, err = run(*arguments, *options)
    assert status == 2 and err.startswith("adapter-checks: ") and err.count("\n") == 1 and words in err
    if options:
        content = as_json(out)
        assert (
            not content["ok"]
            and content["command"] == arguments[0]
            and words in json.dumps(content, ensure_ascii=False)
        )
        assert all(finding["code"] in command.NOT_RUN for finding in content["findings"] if finding["level"] == "fail")
    else:
        assert out == ""


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["folder"], ["merged", "a", "b"], ["data", "x"], ["count", "m", "--rank", "0"], ["count", "m", "--rank", "x"],
     ["memory", "m", "--method", "half"], ["data", "x", "--model", "m", "--max-length", "-3"], ["folder", "a", "--fast"]],
)  # fmt: skip
def test_wrong_arguments(arguments, run):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and "usage: adapter-checks" in err


def test_help_and_version(run):
    for arguments, words in (
        (["--help"], "SUBCOMMAND"),
        (["merged", "--help"], "ADAPTER"),
        (["--version"], __version__),
    ):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "") and words in out


# ------------------------------------------------------------------------------------------------ safety


def test_no_pickle_is_loaded_and_no_network_used(folders, run, monkeypatch):
    import socket

    class Loaded:
        def __reduce__(self):
            return (os.mkdir, (str(folders / "loaded"),))

    for folder in ("base", "adapter", "merged"):
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
            (folders / folder / name).write_bytes(pickle.dumps(Loaded()))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    assert run("folder", "adapter", "--base", "base")[0] == 1
    assert run("merged", "base", "adapter", "merged")[0] == 1
    shutil.move("adapter/adapter_model.safetensors", "elsewhere")
    assert run("folder", "adapter")[0] == 1 and run("merged", "base", "adapter", "merged")[0] == 1
    assert not (folders / "loaded").exists()


@pytest.mark.parametrize(
    ("arguments", "offline"),
    [(["folder", "adapter", "--base", "nowhere"], True), (["folder", "adapter", "--base", "base/nowhere"], True),
     (["folder", "adapter", "--base", "some/model"], False), (["count", "some/model"], False)],
)  # fmt: skip
def test_only_a_hub_id_lets_it_out(arguments, offline, folders, run, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    run(*arguments)
    assert os.environ.get("HF_HUB_OFFLINE") == ("1" if offline else None)


def test_a_hub_id_is_read_from_the_cache(folders, run, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folders / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert run("count", "some/model")[0] == 0
    assert run("data", write_rows(folders / "rows.jsonl", row()), "--model", "some/model")[0] == 0
    (_, config_only), (_, for_tokenizer) = asked
    assert config_only == ["config.json"] and not any("safetensors" in pattern for pattern in for_tokenizer)
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for _, patterns in asked for pattern in patterns)


# ------------------------------------------------------------------------------------------------ as a process


def test_progress_goes_to_stderr_and_only_if_asked_for(folders, run):
    status, out, err = run("merged", "base", "adapter", "merged", "--progress", "--json")
    assert status == 0 and as_json(out) and "... comparing the weights" in err.splitlines()


def test_an_interrupt_says_one_line(folders, run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("adapter_checks.adapter_folder.check_adapter_folder", interrupt)
    assert run("folder", "adapter") == (130, "", "adapter-checks: interrupted.\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupted_process(folders):
    code = "import time, adapter_checks.command as c; c._folder = lambda o: print('up', flush=True) or time.sleep(60); c.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "folder", "adapter"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "adapter-checks: interrupted.\n"


def test_as_a_module_in_another_folder(folders, tmp_path):
    spoil(folders / "adapter", lambda tensors: [t.fill_(torch.nan) for n, t in tensors.items() if "lora_A" in n])
    found = subprocess.run(
        [sys.executable, "-m", "adapter_checks", "folder", str(folders / "adapter"), "--json"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 1 and codes(as_json(found.stdout)) == ["non_finite"] and found.stderr == ""


def test_numbers_that_json_does_not_have():
    assert command._finite({"a": float("nan"), "b": {"c": float("inf")}, "d": 1.5}) == {
        "a": None,
        "b": {"c": None},
        "d": 1.5,
    }
