"""A folder is saved whole or not at all."""

import errno
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from adapter_checks import saving as saving_module
from adapter_checks.errors import InputError
from adapter_checks.safetensors_header import read_safetensors_header
from adapter_checks.saving import saving


def run_python(code):
    """Run code in a fresh interpreter."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def _hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_saving_puts_a_whole_folder_in_place(tmp_path):
    target = tmp_path / "a b é" / "result"
    for text in ("first", "second"):
        with saving(target) as folder:
            assert folder.parent == target.parent and not list(folder.iterdir())
            (folder / f"{text}.txt").write_text(text)
        assert [path.name for path in target.iterdir()] == [f"{text}.txt"]
    assert _hidden(target.parent) == []


def test_saving_where_folders_can_not_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(saving_module, "_exchange", lambda first, second: False)
    test_saving_puts_a_whole_folder_in_place(tmp_path)


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="only there can folders be exchanged in one step")
def test_exchange_swaps_two_full_folders(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"was {name}").touch()
    assert saving_module._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "was b").exists() and (tmp_path / "b" / "was a").exists()


def test_a_failed_second_rename_puts_the_old_result_back(tmp_path, monkeypatch):
    target = tmp_path / "result"
    with saving(target) as folder:
        (folder / "old").touch()
    monkeypatch.setattr(saving_module, "_exchange", lambda first, second: False)
    rename, calls = Path.rename, []

    def fail_second(self, to):
        calls.append(to)
        if len(calls) == 2:
            raise PermissionError(errno.EACCES, "in use")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(PermissionError), saving(target) as folder:
        (folder / "new").touch()
    assert [path.name for path in target.iterdir()] == ["old"] and _hidden(tmp_path) == []


@pytest.mark.parametrize("fault", [RuntimeError("interrupted"), KeyboardInterrupt()])
def test_a_failure_while_saving_leaves_the_old_result_whole(fault, tmp_path):
    target = tmp_path / "result"
    with saving(target) as folder:
        (folder / "old").write_text("whole")
    with pytest.raises(type(fault)), saving(target) as folder:
        (folder / "new").touch()
        raise fault
    assert (target / "old").read_text() == "whole" and len(list(target.iterdir())) == 1
    assert _hidden(tmp_path) == []


def test_a_kill_while_saving_leaves_the_old_result_whole(tmp_path):
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").write_text("whole")
    done = run_python(
        f"""
        import os, signal
        from adapter_checks.saving import saving
        with saving({str(target)!r}) as folder:
            (folder / "new").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        """
    )
    assert done.returncode != 0
    assert [path.name for path in target.iterdir()] == ["old"] and (target / "old").read_text() == "whole"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of a file")
def test_a_full_disk_while_saving_leaves_the_old_result_whole(tmp_path):
    target = tmp_path / "result"
    done = run_python(
        f"""
        import resource
        from pathlib import Path
        from adapter_checks.errors import InputError
        from adapter_checks.saving import saving
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1))
        with saving({str(target)!r}) as folder:
            model.save_pretrained(folder)
        model.lm_head.weight.data.fill_(7)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        for save in (model.save_pretrained, lambda folder: (folder / "big.txt").write_bytes(bytes(60_000))):
            try:
                with saving({str(target)!r}) as folder:
                    save(folder)
                print("nothing was raised")
            except InputError as error:
                print(error)
        """
    )
    assert done.returncode == 0, done.stderr
    errors = done.stdout.strip().splitlines()
    assert len(errors) == 2
    for error in errors:
        assert "no room" in error and str(target) in error and "earlier result is unchanged" in error
    assert _hidden(tmp_path) == []
    read_safetensors_header(target / "model.safetensors")
    from safetensors.torch import load_file

    assert not (load_file(target / "model.safetensors")["lm_head.weight"] == 7).any()


def test_a_broken_safetensors_file_is_never_put_in_place(tmp_path):
    target = tmp_path / "result"
    with pytest.raises(InputError, match="model.safetensors"), saving(target) as folder:
        (folder / "model.safetensors").write_bytes(b"half of it")
    assert not target.exists()


def test_saving_below_a_file_or_over_one_says_so(tmp_path):
    (tmp_path / "file").write_text("precious")
    for target, sentence in (
        (tmp_path / "file" / "result", "can't be written to"),
        (tmp_path / "file", "not a plain folder"),
    ):
        with pytest.raises(InputError, match=sentence), saving(target):
            pytest.fail("the body must not run")
    assert (tmp_path / "file").read_text() == "precious"


def test_saving_never_replaces_the_folder_one_works_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for target in (tmp_path, tmp_path.parent, "."):
        with pytest.raises(InputError, match="replace the folder that you work in"), saving(target):
            pytest.fail("the body must not run")


def test_saving_never_replaces_a_repository(tmp_path):
    (tmp_path / "project" / ".git").mkdir(parents=True)
    with pytest.raises(InputError, match="is a git repository"), saving(tmp_path / "project"):
        pytest.fail("the body must not run")
    assert (tmp_path / "project" / ".git").is_dir()
