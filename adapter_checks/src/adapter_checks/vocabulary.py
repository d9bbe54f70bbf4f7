"""Tokens that were added: has the base a row for each of them, and were the rows that were trained saved with the adapter?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter_checks.errors import InputError
from adapter_checks.model_folder import read_json
from adapter_checks.report import first_few

if TYPE_CHECKING:
    from adapter_checks.report import Report


def check_vocabulary(
    report: Report,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    adapted: Iterable[str],
    folder: Path,
    tables: Mapping[str, int],
    base: str | None,
) -> None:
    """Add findings on the vocabulary.

    shapes   {name: shape} of the adapter's tensors
    adapted  the layers that A and B sit on
    folder   the adapter's
    tables   {path: rows} of the base's embedding and output head
    base     its name or path
    """
    if not tables:
        return
    rows = min(tables.values())
    saved = {
        path: shape[0]
        for path in tables
        if (
            shape := shapes.get(f"base_model.model.{path}.weight")
            or shapes.get(f"base_model.model.{path}.base_layer.weight")
        )
    }
    if other := [(path, count) for path, count in saved.items() if count != tables[path]]:
        report_other_vocabulary(report, other, tables)
    indices = _indices(config.get("trainable_token_indices"))
    if outside := [index for index in indices if not 0 <= index < rows]:
        report.fail(
            "token_outside",
            f"The adapter trained tokens beyond this base's {rows} rows: {first_few(outside)}.",
            "Call base.resize_token_embeddings(len(tokenizer)) before loading, with the tokenizer that it was trained with.",
        )
    tokens = _tokens(folder)
    size = max(tokens.values(), default=-1) + 1
    if size > max(rows, *saved.values(), *indices, 0) + (len(outside) and 1):
        report.fail(
            "tokenizer_larger",
            f"The tokenizer beside the adapter has {size} tokens, the base's embedding {rows} rows, and the file holds none for the "
            "others. If the embedding was enlarged for the training, its new rows were not saved.",
            "Enlarge it by resize_token_embeddings before get_peft_model, and train the new rows with trainable_token_indices or "
            "modules_to_save, which save them.",
        )
        return
    known = _tokens(Path(base)) if base else {}
    padding = _padding(folder)
    new = {token: index for token, index in tokens.items() if token not in known and token != padding} if known else {}
    trained = saved or any(path in adapted for path in tables) or set(new.values()) <= set(indices)
    if new and not trained:
        report.warn(
            "rows_not_saved",
            f"{len(new)} tokens of the tokenizer beside the adapter are new to the base, such as {first_few(new)}, and their rows of the "
            "embedding were neither trained nor saved: the base knows nothing of them.",
            "Train them with trainable_token_indices or modules_to_save, or leave them out of the prompts.",
        )


def report_other_vocabulary(report: Report, found: Iterable[tuple[str, int]], tables: Mapping[str, int]) -> None:
    """found: (path, rows in the file) of an embedding or head that the base has with other rows."""
    found = list(found)
    path, rows = found[0]
    report.fail(
        "vocab_mismatch",
        f"The vocabulary was another one in training: {path} has {rows} rows in the file and {tables[path]} in this base. Tokens were "
        "added, or the embedding was padded.",
        f"Call base.resize_token_embeddings({rows}) before loading, or load the base as it was trained on.",
    )


def _indices(given: Any) -> list[int]:
    lists = given.values() if isinstance(given, dict) else [given or []]
    return [index for entry in lists if isinstance(entry, list) for index in entry if isinstance(index, int)]


def _tokens(folder: Path) -> dict[str, int]:
    """Token -> number, of the tokenizer in a folder; empty if there is none that can be read without loading it."""
    tokens: dict[str, int] = {}
    try:
        content = read_json(folder / "tokenizer.json")
        vocabulary = content["model"]["vocab"]
        pairs = (
            vocabulary.items()
            if isinstance(vocabulary, dict)
            else ((entry[0], i) for i, entry in enumerate(vocabulary))
        )
        tokens = dict(pairs) | {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}
        return {token: index for token, index in tokens.items() if isinstance(index, int)}
    except (InputError, LookupError, TypeError, AttributeError):
        return {}


def _padding(folder: Path) -> str | None:
    """The token that fills up rows: its embedding is never looked at."""
    try:
        token = read_json(folder / "tokenizer_config.json").get("pad_token")
    except InputError:
        return None
    return token.get("content") if isinstance(token, dict) else token
