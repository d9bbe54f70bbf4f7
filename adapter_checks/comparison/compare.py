"""Which faults of an adapter's folder does which tool report? Writes the table into README.md.

    python -m venv /tmp/peft-doctor && /tmp/peft-doctor/bin/pip install peft-doctor==0.9.2
    python adapter_checks/comparison/compare.py --peft-doctor /tmp/peft-doctor/bin/peft-doctor

Each folder is made here: a tiny Llama, a healthy adapter, and one fault at a time. A tool reports a fault if it gives an
error or a warning that it does not give for the healthy adapter. A tool that isn't installed is left out, and with --print
the table only goes to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
sys.path.insert(0, str(HERE.parent / "tests"))

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def rewrite(folder: Path, change: Callable) -> None:
    from safetensors.torch import load_file, save_file

    save_file(
        {name: tensor.contiguous() for name, tensor in change(load_file(folder / WEIGHTS)).items()}, folder / WEIGHTS
    )


def reconfigure(folder: Path, **changes) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def per_tensor(change: Callable) -> Callable:
    return lambda folder: rewrite(folder, lambda tensors: {name: change(name, t) for name, t in tensors.items()})


def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def as_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def merged_beside(folder: Path) -> None:
    for file in (folder.parent / "base").glob("*"):
        if not file.name.startswith("tokenizer"):
            shutil.copy(file, folder)


FAULTS: dict[str, Callable[[Path], object]] = {
    "no weights, only a config": lambda folder: (folder / WEIGHTS).unlink(),
    "weights in a pickle": as_pickle,
    "weights cut short": cut,
    "B is all zero: saved before training": per_tensor(lambda name, t: t * 0 if "lora_B" in name else t),
    "NaN in the weights": per_tensor(lambda name, t: t * float("nan") if "layers.1" in name else t),
    "names of the tensors carry the adapter's": lambda folder: rewrite(
        folder, lambda tensors: {name.replace(".weight", ".mine.weight"): t for name, t in tensors.items()}
    ),
    "saved from a PeftModel in a PeftModel": lambda folder: rewrite(
        folder, lambda tensors: {f"base_model.model.{name}": t for name, t in tensors.items()}
    ),
    "the rank of the config is another one": lambda folder: reconfigure(folder, r=16),
    "a setting of the wrong kind": lambda folder: reconfigure(folder, rank_pattern=["q_proj"]),
    "alpha is 0": lambda folder: reconfigure(folder, lora_alpha=0),
    "the trained head was not saved": lambda folder: reconfigure(
        folder, task_type="SEQ_CLS", modules_to_save=["score"]
    ),
    "a merged model in the same folder": merged_beside,
    "an OLoRA adapter: loading it changes the base": lambda folder: reconfigure(folder, init_lora_weights="olora"),
    "A without B in one layer": lambda folder: rewrite(
        folder, lambda tensors: {name: t for name, t in tensors.items() if "layers.0.mlp.up_proj.lora_B" not in name}
    ),
    "half of the layers are missing": lambda folder: rewrite(
        folder, lambda tensors: {name: t for name, t in tensors.items() if "layers.1" not in name}
    ),
    "layers that the base does not have": lambda folder: rewrite(
        folder, lambda tensors: {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()}
    ),
    "trained on a base of another width": per_tensor(
        lambda name, t: t.repeat(1, 2) if "lora_A" in name else t.repeat(2, 1)
    ),
    "trained on another base of the same shape": lambda folder: reconfigure(
        folder, base_model_name_or_path="someone/else"
    ),
}
HEALTHY: dict[str, Callable[[Path], object]] = {
    "healthy: as PEFT saved it": lambda folder: None,
    "healthy: in bfloat16": per_tensor(lambda name, t: t.bfloat16()),
    "healthy: ranks by rank_pattern, with rsLoRA": lambda folder: reconfigure(
        folder, r=8, rank_pattern={".*": 4}, use_rslora=True
    ),
}


def ours(folder: Path, base: Path | None) -> set[str]:
    from adapter_checks.command import main as command

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if command(["folder", str(folder), "--json", *(["--base", str(base)] if base else [])]) == 2:
            raise RuntimeError("could not be run")
    return {finding["code"] for finding in json.loads(printed.getvalue())["findings"] if finding["level"] != "ok"}


def peft_doctor(program: str) -> Callable[[Path, Path | None], set[str]]:
    def check(folder: Path, base: Path | None) -> set[str]:
        codes: set[str] = set()
        for subcommand in (["inspect-adapter", folder, *(["-m", base] if base else [])], ["adapter-tensors", folder]):
            command = [program, *map(str, subcommand), "-o", "json"]
            found = subprocess.run(command, capture_output=True, text=True)
            issues = json.loads(found.stdout)["issues"]
            codes |= {issue["code"] for issue in issues if issue["severity"] in ("error", "warning")}
        return codes

    return check


def make_folders(root: Path) -> None:
    from transformers import AutoModelForCausalLM

    from adapter_checks.bitsandbytes_workarounds import quiet_imports
    from tiny_models import make_tiny_adapter, make_tiny_model, make_tiny_tokenizer

    quiet_imports()
    tokenizer = make_tiny_tokenizer()
    make_tiny_model(tokenizer).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    make_tiny_adapter(AutoModelForCausalLM.from_pretrained(root / "base")).save_pretrained(root / "healthy")


def table(tools: dict[str, Callable], root: Path) -> str:
    make_folders(root)
    columns = [(tool, with_base) for tool in tools for with_base in (False, True)]
    heads = [f"{tool}, {'and the base' if with_base else 'folder alone'}" for tool, with_base in columns]
    lines = ["| Folder | " + " | ".join(heads) + " |", "|---|" + ":-:|" * len(columns)]
    counts = dict.fromkeys(columns, 0)
    usual = {
        (tool, with_base): tools[tool](root / "healthy", root / "base" if with_base else None)
        for tool, with_base in columns
    }
    for name, plant in {**FAULTS, **HEALTHY}.items():
        folder = shutil.copytree(root / "healthy", root / "adapter")
        plant(folder)
        cells = []
        for tool, with_base in columns:
            try:
                reported = bool(tools[tool](folder, root / "base" if with_base else None) - usual[tool, with_base])
            except Exception:
                cells.append("crash")
                continue
            counts[tool, with_base] += reported and name in FAULTS
            cells.append(
                ("reported" if name in FAULTS else "false alarm") if reported else "–" if name in FAULTS else "passes"
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        shutil.rmtree(folder)
    lines.append(
        f"| **reported, of {len(FAULTS)} faults** | " + " | ".join(f"**{counts[column]}**" for column in columns) + " |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peft-doctor", default=shutil.which("peft-doctor"), metavar="PROGRAM")
    parser.add_argument("--print", action="store_true")
    options = parser.parse_args()
    tools = {"adapter-checks": ours}
    if options.peft_doctor:
        tools["peft-doctor"] = peft_doctor(options.peft_doctor)
    with tempfile.TemporaryDirectory() as folder:
        rows = table(tools, Path(folder))
    print(rows)
    if not options.print:
        text = README.read_text(encoding="utf-8")
        marks = "<!-- comparison -->", "<!-- end of comparison -->"
        README.write_text(
            re.sub(f"(?s){marks[0]}.*{marks[1]}", lambda _: f"{marks[0]}\n{rows}\n{marks[1]}", text), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
