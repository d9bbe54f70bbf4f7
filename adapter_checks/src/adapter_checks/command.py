"""The command `adapter-checks`, also `python -m adapter_checks`: the checks of this package that need nothing but files.

Exit status: 0 if nothing failed (there may be warnings), 1 if a check found a failure, 2 if it could not be run, 130 if it
was interrupted. Pickles are never loaded, code in a model's folder never runs, and the hub is asked only for a model that was
given as organisation/name.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_checks import __version__
from adapter_checks.errors import InputError
from adapter_checks.report import Report

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

SCHEMA = 1  # of the JSON: raised when a key changes its meaning or goes, not when one is added
# Findings which say that a check could not be run, rather than what it found.
NOT_RUN = {
    "not_run",
    "bad_argument",
    "bad_base",
    "check_failed",
    "no_folder",
    "not_a_folder",
    "not_readable",
    "no_preference_run",
}
# The parser leaves these at None, so that one which was given where it has no meaning can be told.
_LORA_DEFAULTS: dict[str, Any] = {
    "rank": 8,
    "alpha": 16,
    "target_modules": ["all-linear"],
    "bias": "none",
    "task_type": "CAUSAL_LM",
}


@dataclasses.dataclass
class Outcome:
    """What a subcommand found: a report, what was measured, and what to print instead of the report."""

    report: Report
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, or those of the process; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that lacks √ or × must not end the run
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:  # argparse has said why; 0 after --help
        return stop.code if isinstance(stop.code, int) else 2
    try:
        _prepare_libraries(options)
        outcome = options.run(options)
        failures = [finding for finding in outcome.report.findings if finding.level == "fail"]
        if failures and all(finding.code in NOT_RUN for finding in failures):
            return _not_run(options, f"{failures[0].message} {failures[0].remedy}", outcome)
        print(_as_json(options.subcommand, outcome) if options.json else outcome.text or outcome.report, flush=True)
        return int(not outcome.report.ok)
    except KeyboardInterrupt:
        print("adapter-checks: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `adapter-checks ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (InputError, OSError) as error:
        return _not_run(options, str(error))
    except ImportError as error:
        return _not_run(options, f"a library is missing or doesn't fit: {error}")


def _not_run(options: argparse.Namespace, why: str, outcome: Outcome | None = None) -> int:
    """One sentence on stderr; with --json the report as well, or one that says the same."""
    why = " ".join(why.split())
    print(f"adapter-checks: {why}", file=sys.stderr)
    if options.json:
        if outcome is None:
            outcome = Outcome(Report(options.subcommand))
            outcome.report.add("fail", "not_run", why)
        print(_as_json(options.subcommand, outcome), flush=True)
    return 2


def _prepare_libraries(options: argparse.Namespace) -> None:
    """Before transformers is imported: no network unless a hub id was given, and nothing on stderr but our own lines."""
    from adapter_checks.bitsandbytes_workarounds import quiet_imports

    names = [getattr(options, name, None) or () for name in ("adapter", "base", "merged", "model")]
    given = [name for entry in names for name in ([entry] if isinstance(entry, str) else entry)]
    # is_hub_id() would import huggingface_hub, which reads the variable only once.
    if not any(name.count("/") == 1 and not Path(name).expanduser().parent.exists() for name in given):
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not options.progress:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    quiet_imports()


# ---------------------------------------------------------------------------------------------- subcommands


def _folder(options: argparse.Namespace) -> Outcome:
    from adapter_checks.adapter_folder import check_adapter_folder
    from adapter_checks.model_folder import is_hub_id, load_config, local_folder

    adapter = local_folder(options.adapter) if is_hub_id(options.adapter) else options.adapter
    return Outcome(check_adapter_folder(adapter, load_config(options.base) if options.base else None))


def _merged(options: argparse.Namespace) -> Outcome:
    from adapter_checks.merged_folder import check_merged_folder

    texts = None
    if options.texts:
        texts = [line for line in _read_text(options.texts).splitlines() if line.strip()]
    rows = [row for _, row in _read_rows(options.rows)] if options.rows else None
    for name, content in ((options.rows, rows), (options.texts, texts)):
        if name and not content:
            raise InputError(f"{name} is empty. Leave it out, or write one a line.")
    report = check_merged_folder(
        options.base,
        options.adapter,
        options.merged,
        rows=rows,
        texts=texts,
        dtype=options.dtype,
        device=options.device,
        progress=_progress(options),
    )
    measured = ("max_abs", "top1_agreement", "kl", "tolerance", "times", "rounding", "dtype", "scores")
    return Outcome(report, {name: getattr(report, name) for name in measured})


def _data(options: argparse.Namespace) -> Outcome:
    from adapter_checks.preference_data import check_preference_lines, is_preference_row
    from adapter_checks.training_data import check_sft_lines

    tokenizer, progress = _tokenizer(options.model), _progress(options)

    def counted() -> Iterator[tuple[int, Mapping[str, Any]]]:
        for count, numbered in enumerate(_read_rows(options.rows)):
            if progress and count and count % 1000 == 0:
                progress(f"{count:,} rows read")
            yield numbered

    rows = counted()
    first = list(itertools.islice(rows, 1))
    check = check_preference_lines if any(is_preference_row(row) for _, row in first) else check_sft_lines
    return Outcome(check(itertools.chain(first, rows), tokenizer, options.max_length))


def _run(options: argparse.Namespace) -> Outcome:
    from adapter_checks.model_folder import read_json
    from adapter_checks.preference_run import check_preference_run

    path = Path(options.state).expanduser()
    path = path / "trainer_state.json" if path.is_dir() else path
    history = read_json(path).get("log_history")
    if not isinstance(history, list):
        raise InputError(
            f"{path} has no log_history. Give the trainer_state.json of a checkpoint, or the checkpoint's folder."
        )
    return Outcome(check_preference_run(history, options.beta))


def _count(options: argparse.Namespace) -> Outcome:
    from adapter_checks.counting import count_lora_parameters
    from adapter_checks.model_folder import load_config

    count = count_lora_parameters(load_config(options.model), _lora_config(options))
    groups: dict[tuple[str, int, int, int], int] = {}
    for module in count.modules:
        kind = (module.name.rpartition(".")[2], module.in_features, module.out_features, module.rank)
        groups[kind] = groups.get(kind, 0) + 1
    layers = [
        {"name": name, "layers": number, "in_features": inputs, "out_features": outputs, "rank": rank,
         "parameters": number * rank * (inputs + outputs)}
        for (name, inputs, outputs, rank), number in groups.items()
    ]  # fmt: skip
    lines = [str(count)] + [
        f"  {layer['name']:<16} {layer['layers']:>4} × ({layer['in_features']:,} -> {layer['out_features']:,}), rank {layer['rank']}: "
        f"{layer['parameters']:,}"
        for layer in layers
    ]
    measured = {name: getattr(count, name) for name in ("trainable", "adapter", "biases", "base", "share")}
    return Outcome(Report("Parameters"), measured | {"layers": layers}, "\n".join(lines))


def _memory(options: argparse.Namespace) -> Outcome:
    from adapter_checks.memory import estimate_memory
    from adapter_checks.model_folder import load_config

    settings = {
        "method": options.method,
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
        "dtype": options.dtype,
        "optimizer": options.optimizer,
        "gradient_checkpointing": options.gradient_checkpointing,
        "double_quantization": options.double_quantization,
        "devices": options.devices,
        "strategy": options.strategy or "ddp",
    }
    if options.strategy and options.devices == 1:
        raise InputError("--strategy has no meaning with one device. Leave it out, or give --devices.")
    given = [name for name in _LORA_DEFAULTS if getattr(options, name) is not None] if options.method == "full" else []
    given += ["double_quantization"] if options.double_quantization and options.method != "qlora" else []
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(
            f"{names} has no meaning with --method {options.method}. Leave it out, or choose another method."
        )
    lora_config = None if options.method == "full" else _lora_config(options)
    estimate = estimate_memory(load_config(options.model), lora_config=lora_config, **settings)
    title = (
        f"{options.method}, {options.batch_size} × {options.sequence_length} tokens, {options.dtype}, {options.optimizer}"
        + (", gradient checkpointing" if options.gradient_checkpointing else "")
        + (f", each of {options.devices} devices with {settings['strategy']}" if options.devices > 1 else "")
    )
    note = "Beside these a GPU holds the libraries' own buffers, and what fragmentation leaves unused."
    report = Report("Memory")
    if estimate.warning:
        report.warn(
            "beyond_context", estimate.warning, "Take a shorter --sequence-length, and the same max_length in training."
        )
    measured = {
        "bytes": estimate.sizes(),
        "collectives": dict(estimate.collectives),
        "sent": estimate.sent,
        "settings": settings,
    }
    return Outcome(report, measured, f"{title}\n{estimate}\n{note}")


def _config(options: argparse.Namespace) -> Outcome:
    import peft

    from adapter_checks.adapter_config import unknown_settings
    from adapter_checks.counting import meta_model
    from adapter_checks.lora_config import check_lora_config
    from adapter_checks.model_folder import load_config, read_json

    path = Path(options.adapter_config).expanduser()
    content = read_json(path / "adapter_config.json" if path.is_dir() else path)
    if content.get("peft_type", "LORA") != "LORA":
        raise InputError(f"{path} is a configuration for {content['peft_type']}, and this check knows LORA only.")
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    try:
        lora_config = peft.LoraConfig(**{name: value for name, value in content.items() if name in known})
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"PEFT refuses {path}: {error}") from error
    lora_config.inference_mode = False  # as PEFT saves each configuration, whatever it was trained with
    task = getattr(lora_config.task_type, "value", lora_config.task_type)
    report = check_lora_config(meta_model(load_config(options.model), task), lora_config, options.learning_rate)
    if unknown := unknown_settings(content):
        report.warn(
            "unknown_settings",
            f"The installed PEFT {peft.__version__} does not know {', '.join(unknown)}, and leaves it out.",
            "Correct the name, or use the version of PEFT that wrote the file.",
        )
    return Outcome(report)


# ---------------------------------------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adapter-checks",
        description="Find what silently goes wrong with LoRA: adapter folders, merged models, training data, configurations.",
        epilog="Exit status: 0 nothing failed, 1 a failure was found, 2 the check could not be run. A MODEL is a folder, a "
        "hub id such as organisation/name or, where no weights are needed, a config.json.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the report as JSON")
    common.add_argument(
        "--progress", action="store_true", help="say on stderr what is being done (on a terminal: always)"
    )
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], Outcome], text: str) -> argparse.ArgumentParser:
        subparser = subparsers.add_parser(name, parents=[common], help=text, description=text)
        subparser.set_defaults(run=run)
        return subparser

    folder = add("folder", _folder, "is this folder a whole, safe adapter, and does it fit its base?")
    folder.add_argument("adapter", metavar="ADAPTER", help="folder or hub id of the adapter")
    folder.add_argument("--base", metavar="MODEL", help="compare names and shapes with this base; no weights are read")

    merged = add("merged", _merged, "is the merged model the base with the trained adapter?")
    merged.add_argument("base", metavar="BASE")
    merged.add_argument("adapter", metavar="ADAPTER", nargs="+", help="several, if they were merged together")
    merged.add_argument("merged", metavar="MERGED")
    merged.add_argument(
        "--rows", metavar="ROWS.jsonl", help='held-out rows {"prompt": [messages], "completion": [messages]}'
    )
    merged.add_argument("--texts", metavar="FILE", help="texts to compare logits on, one a line")
    merged.add_argument("--dtype", help="of the arithmetic: float32 (4 bytes a parameter), bfloat16 or float16")
    merged.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")

    data = add(
        "data", _data, "is each row for fine-tuning, or each preference pair, whole and within the maximal length?"
    )
    data.add_argument(
        "rows",
        metavar="ROWS.jsonl",
        help="prompt and completion, messages, or text in each row; for DPO and reward models chosen and rejected, and prompt",
    )
    data.add_argument("--model", metavar="MODEL", required=True, help="whose tokenizer and chat template to use")
    data.add_argument("--max-length", type=_positive, metavar="N", help="in tokens; default: no limit")

    run = add(
        "run",
        _run,
        "does training on preferences (DPO, reward models, GRPO, RLOO) do what it should, by a checkpoint's log?",
    )
    run.add_argument("state", metavar="CHECKPOINT", help="folder of a checkpoint, or its trainer_state.json")
    run.add_argument("--beta", type=float, help="of DPO; default: 0.1, as in TRL")

    count = add("count", _count, "how many parameters would a LoRA adapter train? From the model's configuration alone")
    memory = add("memory", _memory, "how much memory would training take? From the model's configuration alone")
    for subparser in (count, memory):
        subparser.add_argument("model", metavar="MODEL")
        lora = subparser.add_argument_group("the adapter")
        lora.add_argument("--rank", type=_positive, help="default: 8")
        lora.add_argument("--alpha", type=float, help="default: 16; changes neither number nor memory")
        lora.add_argument("--target-modules", nargs="+", metavar="NAME",
                          help="names of layers, or one regular expression; default: all-linear")  # fmt: skip
        lora.add_argument("--bias", choices=("none", "all", "lora_only"), help="default: none")
        lora.add_argument("--task-type", help="default: CAUSAL_LM")
    memory.add_argument("--method", choices=("full", "lora", "qlora"), default="lora", help="default: lora")
    memory.add_argument("--batch-size", type=_positive, default=1, help="default: 1")
    memory.add_argument("--sequence-length", type=_positive, default=1024, help="in tokens; default: 1024")
    memory.add_argument("--dtype", default="bfloat16", help="of the base and its activations; default: bfloat16")
    memory.add_argument("--optimizer", choices=("adamw", "adamw_8bit"), default="adamw", help="default: adamw")
    memory.add_argument("--gradient-checkpointing", action="store_true")
    memory.add_argument(
        "--double-quantization", action="store_true", help="with qlora: 4.127 bits a parameter, not 4.5"
    )
    memory.add_argument("--devices", type=_positive, default=1, help="that train together; default: 1")
    memory.add_argument(
        "--strategy", choices=("ddp", "zero1", "zero2", "zero3", "fsdp"), help="how devices share; default: ddp"
    )

    config = add("config", _config, "will this LoRA configuration do what it says on this model?")
    config.add_argument("model", metavar="MODEL")
    config.add_argument(
        "adapter_config", metavar="ADAPTER_CONFIG", help="adapter_config.json, or the folder that holds it"
    )
    config.add_argument("--learning-rate", type=float, help="Adam's, to be judged too")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _lora_config(options: argparse.Namespace) -> LoraConfig:
    from peft import LoraConfig, TaskType

    settings = {
        name: default if (given := getattr(options, name)) is None else given
        for name, default in _LORA_DEFAULTS.items()
    }
    targets = settings["target_modules"]
    if len(targets) == 1 and (targets[0] == "all-linear" or set(targets[0]) & set("*+?|()[]\\^$")):
        settings["target_modules"] = targets[0]
    if settings["task_type"] not in list(TaskType):
        raise InputError(f"There is no task type {settings['task_type']!r}. Choose one of: {', '.join(TaskType)}.")
    try:
        return LoraConfig(r=settings.pop("rank"), lora_alpha=settings.pop("alpha"), **settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"PEFT refuses these settings: {error}") from error


# ---------------------------------------------------------------------------------------------- reading and writing


def _read_text(name: str) -> str:
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}).") from error
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}.") from error


def _read_rows(name: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """The rows of a file, one JSON object a line, each with the number of its line."""
    for number, line in enumerate(_read_text(name).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"Line {number} of {name} is not JSON ({error}). Write one object a line.") from error
        if not isinstance(row, dict):
            raise InputError(f"Line {number} of {name} is a {type(row).__name__}. Write one object a line.")
        yield number, row


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    import transformers

    from adapter_checks.model_folder import SAFE_FILES, local_folder

    folder = local_folder(model, [pattern for pattern in SAFE_FILES if "safetensors" not in pattern])
    if not any(folder.glob("tokenizer*")):
        raise InputError(f"{model} has no tokenizer.")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged files and code of its own: each its own exception
        raise InputError(f"The tokenizer of {model} can't be loaded: {error}") from error


def _progress(options: argparse.Namespace) -> Callable[[str], None] | None:
    if not (options.progress or sys.stderr.isatty()):
        return None
    return lambda line: print(f"... {line}", file=sys.stderr, flush=True)


def _as_json(subcommand: str, outcome: Outcome) -> str:
    content = {
        "schema": SCHEMA,
        "version": __version__,
        "command": subcommand,
        "title": outcome.report.title,
        "ok": outcome.report.ok,
        "findings": [dataclasses.asdict(finding) for finding in outcome.report.findings],
        "measured": _finite(outcome.measured),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: both become null."""
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
