"""The training loop that lesson 2 writes by hand, for lessons that train a few steps to look at something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from course_utils import runtime

if TYPE_CHECKING:
    import torch


def encode(tokenizer, row) -> dict[str, list[int]]:
    """One conversation as token ids, with labels on the answer only: -100 for each token of the prompt."""
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


def collate(tokenizer, rows) -> dict[str, torch.Tensor]:
    """Rows of different lengths as tensors of shape (batch, longest), padded on the right, with their attention mask."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows], device=runtime.device())
        for key, fill in {"input_ids": pad, "labels": -100, "attention_mask": 0}.items()
    }


def batches(tokenizer, rows, size) -> list[dict[str, torch.Tensor]]:
    """The rows of a task in their order, `size` at a time, encoded and collated."""
    encoded = [encode(tokenizer, row) for row in rows]
    return [collate(tokenizer, encoded[start : start + size]) for start in range(0, len(encoded), size)]


def train(model, batches, learning_rate=1e-3) -> list[float]:
    """One step of AdamW for each batch, on what has `requires_grad`. Returns the losses."""
    import torch

    from course_utils.progress import ProgressLine

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    line, losses = ProgressLine(len(batches)), []
    model.train()
    for step, batch in enumerate(batches):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        line.update(step + 1, f"loss {losses[-1]:.3f}")
    model.eval()
    return losses
