"""Progress as plain text: it needs no widgets, so what it last said stays in a saved notebook.

Importing this module imports transformers, so a lesson does that after `runtime.quiet_imports`.
"""

from __future__ import annotations

import html
import sys
import time

from adapter_checks.bitsandbytes_workarounds import quiet_imports

quiet_imports()  # the trainer's callbacks bring bitsandbytes in

from transformers import PrinterCallback, ProgressCallback, TrainerCallback  # noqa: E402


class ProgressLine:
    """One line of text that is replaced in place in a notebook, and printed now and then elsewhere.

    The remaining time shows only while work goes on: the last text, which is saved, is the same for the same run.
    Several in one cell of a notebook share one line, so that a cell of many short runs is not a wall of last steps.
    begun: how many of `total` were done before, as when training is resumed.
    """

    _of_cell = (None, None)  # the count of the cell that has a line, and the line's handle

    def __init__(self, total: int, unit: str = "step", begun: int = 0):
        self.total = total
        self.unit = unit
        self.begun = begun
        self._start = self._shown_at = time.monotonic()
        self._handle = None
        self._display = _notebook_display()
        # A screen can take two updates a second; a log is better read with few lines.
        self._interval = 0.5 if self._display else 5.0

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of `total` are done; `note` is shown behind. Cheap to call often."""
        now = time.monotonic()
        finished = done >= self.total
        # In a notebook the first line comes at once: something moves on the screen.
        waiting = self._display is None or self._handle is not None
        if waiting and not finished and now - self._shown_at < self._interval:
            return
        self._shown_at = now
        parts = [f"{self.unit} {done} of {self.total}", note]
        if not finished and done > self.begun:
            parts.append(f"about {(now - self._start) / (done - self.begun) * (self.total - done):.0f} s left")
        self.show(" · ".join(part for part in parts if part))

    def show(self, text: str) -> None:
        """Replace the line by `text` at once."""
        if self._display is None:
            print(text, flush=True)
            return
        bundle = {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>"}
        cell, handle = ProgressLine._of_cell
        if self._handle is None and cell is not None and cell == _cell():
            self._handle = handle
        if self._handle is None:
            self._handle = self._display(bundle, raw=True, display_id=True)
            ProgressLine._of_cell = _cell(), self._handle
        else:
            self._handle.update(bundle, raw=True)


def _notebook_display():
    """IPython's display function if this runs in a notebook's kernel, else None."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import display

    return display


def _cell():
    """The number of the notebook's cell that runs, which is another one each time that it runs."""
    return sys.modules["IPython"].get_ipython().execution_count


class Progress(TrainerCallback):
    """Shows a Trainer's step, training loss and validation loss in one line.

    `Progress().attach(trainer)` also takes away the callback that would print every log as a dict.
    """

    def __init__(self):
        self._line = None
        self._losses = {}

    def attach(self, trainer):
        """Make this the only progress display of `trainer`; returns the trainer."""
        for other in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(other)
        trainer.add_callback(self)
        return trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._losses = {}
        self._line = ProgressLine(state.max_steps, begun=state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps:  # the last step shows at the end, with its losses
            self._line.update(state.global_step, self._note())

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key, label in (("loss", "loss"), ("eval_loss", "validation loss")):
            if key in (logs or {}):
                self._losses[label] = float(logs[key])

    def on_train_end(self, args, state, control, **kwargs):
        # A run that stopped early did fewer steps than planned, and its line says so.
        self._line.show(" · ".join(filter(None, [f"step {state.global_step} of {state.max_steps}", self._note()])))

    def _note(self) -> str:
        return " · ".join(f"{label} {value:.3f}" for label, value in self._losses.items())
