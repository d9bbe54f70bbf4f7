"""Progress as plain text."""

import json
from pathlib import Path

from course_utils import runtime
from course_utils.progress import Progress, ProgressLine

ROOT = Path(__file__).resolve().parent.parent


def _trainer(model, tokenizer, folder, steps=6, **options):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 8
    settings = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        logging_steps=2,
        save_strategy="no",
        **runtime.trainer_settings(),
        **options,
    )
    data = Dataset.from_list(rows)
    return SFTTrainer(model=model, args=settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def test_progress_prints_the_last_step_and_the_losses_and_no_dicts(tiny_model, tiny_tokenizer, tmp_path, capsys):
    trainer = _trainer(tiny_model, tiny_tokenizer, tmp_path, eval_strategy="steps", eval_steps=3)
    Progress().attach(trainer).train()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("step 6 of 6 · loss ") and " · validation loss " in lines[-1]
    assert not any("{" in line for line in lines)
    assert not any("left" in line for line in lines[-1:])


def test_progress_of_a_run_that_stops_early_does_not_claim_the_rest(tiny_model, tiny_tokenizer, tmp_path, capsys):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3
            return control

    trainer = _trainer(tiny_model, tiny_tokenizer, tmp_path)
    trainer.add_callback(Stop())
    Progress().attach(trainer).train()
    assert capsys.readouterr().out.splitlines()[-1].startswith("step 3 of 6")


def test_progress_in_a_notebook_is_one_saved_text_without_widgets():
    import nbformat
    from nbclient import NotebookClient

    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from course_utils.runtime import quiet_imports
quiet_imports()
from course_utils.progress import ProgressLine
for lab in range(2):
    line = ProgressLine(3, unit="batch")
    for done in range(1, 4):
        line.update(done, f"lab {{lab}} loss <1>")
"""
    cells = [nbformat.v4.new_code_cell(text) for text in (code, "ProgressLine(9).update(1)")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=200, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs  # one for both labs, and no warning about missing widgets
    assert output.data["text/plain"] == "batch 3 of 3 · lab 1 loss <1>"
    assert output.data["text/html"] == "<pre>batch 3 of 3 · lab 1 loss &lt;1&gt;</pre>"
    (output,) = notebook.cells[1].outputs  # a new cell has a line of its own
    assert output.data["text/plain"].startswith("step 1 of 9")
    assert "widgets" not in notebook.metadata and "widget" not in json.dumps(notebook)


def test_time_left_counts_from_where_work_was_resumed(monkeypatch, capsys):
    from course_utils import progress

    clock = iter([0.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    progress.ProgressLine(100, begun=60).update(80)
    assert capsys.readouterr().out == "step 80 of 100 · about 20 s left\n"


def test_progress_line_prints_seldom_outside_a_notebook(capsys):
    line = ProgressLine(1000)
    for done in range(1, 1001):
        line.update(done)
    assert capsys.readouterr().out == "step 1000 of 1000\n"
