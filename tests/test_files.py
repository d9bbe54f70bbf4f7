"""A text file is written whole or not at all."""

from pathlib import Path

import pytest

from course_utils.files import write_text


def test_a_file_is_written_as_it_is_in_a_place_with_spaces_and_accents(tmp_path):
    path = tmp_path / "Kurs für später" / "a b.txt"
    for text in ("old\n", "é\r\nnew\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode() and list(path.parent.iterdir()) == [path]
    beside = tmp_path / "beside"
    beside.touch()
    assert path.stat().st_mode == beside.stat().st_mode  # as any other file that a person makes


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_failed_write_leaves_the_old_file_whole(step, tmp_path, monkeypatch):
    path = tmp_path / "a.ipynb"
    write_text(path, "old")
    write = Path.write_text

    def full(self, *arguments, **options):
        write(self, "ne")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
