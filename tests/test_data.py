"""Task loading, against small files; the shipped ones are in test_shipped.py."""

import json
import os
import subprocess
import sys

import pytest

from adapter_checks.errors import InputError
from course_utils import data, paths


def make_row(number, novel=False):
    return {
        "prompt": [{"role": "user", "content": f"Where is the kettle number {number}?"}],
        "completion": [{"role": "assistant", "content": f"In box {number}."}],
        "kind": "where",
        "novel": novel,
    }


def write_task(folder, task="reading", sizes=(3, 2, 2)):
    (folder / task).mkdir(parents=True)
    number = 0
    for split, size in zip(data.SPLITS, sizes):
        rows = [make_row(number + i, novel=split == "test") for i in range(size)]
        number += size
        (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Data and results in a place whose name has spaces, accents and the signs that file patterns use."""
    folder = tmp_path / "Kurs für später [alt] *1" / "data"
    write_task(folder)
    monkeypatch.setattr(paths, "data_dir", lambda: folder)
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "résultats de [x]"))
    return folder


def test_task_files_are_paths_by_split(place):
    assert data.task_files("reading") == {split: str(place / "reading" / f"{split}.jsonl") for split in data.SPLITS}


def test_load_task_keeps_rows_as_they_are(place):
    loaded = data.load_task("reading")
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "validation": 2, "test": 2}
    assert loaded["train"][1] == make_row(1)
    assert data.load_task("reading", "test")[0] == make_row(5, novel=True)


def test_load_task_writes_under_runs_only(place, tmp_path):
    before = sorted(place.rglob("*"))
    data.load_task("reading")
    assert sorted(place.rglob("*")) == before
    assert list((tmp_path / "résultats de [x]" / "cache").rglob("*.arrow"))


def test_changed_files_are_not_served_from_the_cache(place):
    data.load_task("reading")
    for split in data.SPLITS:
        (place / "reading" / f"{split}.jsonl").unlink()
    (place / "reading").rmdir()
    write_task(place, sizes=(5, 1, 1))
    assert len(data.load_task("reading", "train")) == 5


def test_load_task_shows_no_bar_and_leaves_the_setting_alone(place, capfd):
    import datasets

    datasets.enable_progress_bars()
    data.load_task("reading")
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()


def test_unknown_names_are_answered_with_the_known_ones(place):
    with pytest.raises(InputError, match="no task 'raeding'.*reading, sailor, extract, mood, recall"):
        data.load_task("raeding")
    with pytest.raises(InputError, match="no split 'dev'.*train, validation, test"):
        data.load_task("reading", "dev")


def test_a_further_part_is_loaded_alone_and_missed_where_there_is_none(place):
    rows = (place / "reading" / "test.jsonl").read_text(encoding="utf-8")
    (place / "reading" / "typed.jsonl").write_text(rows, encoding="utf-8")
    assert list(data.load_task("reading", "typed")) == list(data.load_task("reading", "test"))
    assert set(data.load_task("reading")) == set(data.SPLITS)
    with pytest.raises(InputError, match="own_words.jsonl.*git checkout"):
        data.load_task("reading", "own_words")


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ("Who?", r"one text, 'Who\?'. Put it into a list"),
        ([], "at least one text is needed"),
        (None, "at least one text is needed"),
        (["Who?", 3], "One of the texts is 3"),
        (["Who?", " "], "One of the texts is ' '"),
    ],
)
def test_what_a_reader_typed_has_to_be_a_list_of_texts(texts, sentence):
    with pytest.raises(InputError, match=sentence):
        data.check_texts(texts)
    data.check_texts(["Who?"])


def test_missing_and_broken_files_are_named(place):
    with pytest.raises(InputError, match="sailor.*git checkout"):
        data.load_task("sailor")
    (place / "reading" / "test.jsonl").write_text('{"prompt": [{"role": "us')
    with pytest.raises(InputError, match="files of 'reading'.*JSON lines"):
        data.load_task("reading")


@pytest.mark.parametrize("offline", ["0", "1"])
def test_load_task_makes_no_network_call(offline, place, tmp_path):
    # Forbidden at the lowest place that Python has, and told apart from calls that a library catches.
    code = f"""
import socket, sys
attempts = []
def forbid(*args, **kwargs):
    attempts.append(args)
    raise OSError("no network here")
socket.getaddrinfo = forbid
socket.socket.connect = forbid
socket.socket.connect_ex = forbid
from pathlib import Path
from course_utils import data, paths
paths.data_dir = lambda: Path({str(place)!r})
print(len(data.load_task("reading", "train")), attempts)
"""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(tmp_path / "empty home"),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "3 []", done.stderr
