"""The book of paths: places, the base model in use, its adapters."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from adapter_checks.errors import InputError
from course_utils import paths

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------- places


def test_places_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    before = paths.project_root(), paths.models_dir(), paths.data_dir()
    monkeypatch.chdir(tmp_path)
    assert (paths.project_root(), paths.models_dir(), paths.data_dir()) == before
    assert before == (ROOT, ROOT / "models", ROOT / "data")


def test_runs_dir_is_in_the_checkout_unless_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "project_root", lambda: tmp_path)
    monkeypatch.delenv("COURSE_RUNS")
    assert paths.runs_dir() == tmp_path / "runs" and (tmp_path / "runs").is_dir()
    elsewhere = tmp_path / "Ergebnisse für später" / "é"
    monkeypatch.setenv("COURSE_RUNS", str(elsewhere))
    assert paths.runs_dir() == elsewhere and elsewhere.is_dir()


@pytest.fixture
def unwritable_checkout(tmp_path, monkeypatch):
    """A place below a plain file: there even root, whom no permission stops, can't make a folder."""
    file = tmp_path / "checkout"
    file.write_text("a file where the checkout should be")
    monkeypatch.setattr(paths, "project_root", lambda: file)
    monkeypatch.delenv("COURSE_RUNS")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(paths.tempfile, "gettempdir", lambda: str(temporary))
    monkeypatch.setattr(paths, "_told_fallback", set())
    return file


def test_read_only_checkout_falls_back_and_says_so_once(unwritable_checkout, capsys):
    folder = paths.runs_dir()
    assert folder.is_dir() and folder.is_relative_to(paths.tempfile.gettempdir())
    assert paths.runs_dir() == folder
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and str(folder) in said[0] and "COURSE_RUNS" in said[0]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has a temporary folder for each user")
def test_fallback_is_private_and_refuses_a_folder_put_there_by_somebody_else(unwritable_checkout, monkeypatch):
    folder = paths.runs_dir()
    assert folder.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(paths.os, "getuid", lambda owner=os.getuid(): owner)
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    with pytest.raises(InputError, match="belongs to another user"):
        paths.runs_dir()


def test_a_read_only_mount_is_noticed_although_permissions_allow_writing(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    monkeypatch.setattr(paths.tempfile, "TemporaryFile", refuse)
    assert os.access(tmp_path, os.W_OK)
    with pytest.raises(InputError, match="Read-only file system"):
        paths.runs_dir()


def test_course_runs_that_can_not_be_made_is_an_error_not_a_fallback(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "file" / "runs"))
    with pytest.raises(InputError, match="COURSE_RUNS names .*can't be written to"):
        paths.runs_dir()


# ---------------------------------------------------------------------------------------------- base model


def test_base_model_given_as_a_folder_in_a_place_with_spaces_and_accents(tiny_model_folder, tmp_path, monkeypatch):
    place = tmp_path / "Modèles de cours" / "käse 1"
    shutil.copytree(tiny_model_folder, place)
    monkeypatch.chdir(place.parent)
    monkeypatch.setenv("COURSE_BASE_MODEL", "käse 1")
    assert paths.base_model() == str(place)  # absolute: it holds when the working directory changes
    assert not paths.is_shipped_base()
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(paths.base_model()).config.hidden_size == 64


def test_hub_id_is_passed_through(monkeypatch):
    monkeypatch.setenv("COURSE_BASE_MODEL", "some-org/Some_Model-1.5B")
    assert paths.base_model() == "some-org/Some_Model-1.5B"
    assert not paths.is_shipped_base()


def test_shipped_base_named_by_its_path_is_still_the_shipped_one(monkeypatch):
    assert paths.is_shipped_base()
    monkeypatch.setenv("COURSE_BASE_MODEL", str(paths.models_dir() / "base"))
    assert paths.is_shipped_base()


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./folder", "~/no/such", "folder", "a/b/c", "C:\\models\\x", "org/"]
)
def test_base_model_that_does_not_exist(name, monkeypatch):
    monkeypatch.setenv("COURSE_BASE_MODEL", name)
    with pytest.raises(InputError) as caught:
        paths.base_model()
    assert name in str(caught.value) and "no such folder" in str(caught.value) and "unset it" in str(caught.value)


def test_mistyped_relative_folder_is_not_taken_for_a_hub_id(tiny_model_folder, monkeypatch):
    monkeypatch.chdir(tiny_model_folder.parent.parent)
    monkeypatch.setenv("COURSE_BASE_MODEL", f"{tiny_model_folder.parent.name}/modle")
    with pytest.raises(InputError, match="no such folder"):
        paths.base_model()


def test_relative_folder_counts_from_the_course_too_since_kernels_run_in_notebooks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_BASE_MODEL", "models/base")
    assert paths.base_model() == str(paths.models_dir() / "base") and paths.is_shipped_base()
    monkeypatch.setenv("COURSE_BASE_MODEL", "models/bse")
    with pytest.raises(InputError, match="no such folder"):
        paths.base_model()


def test_base_model_that_is_a_file(tiny_model_folder, monkeypatch):
    monkeypatch.setenv("COURSE_BASE_MODEL", str(tiny_model_folder / "model.safetensors"))
    with pytest.raises(InputError, match="is a file"):
        paths.base_model()


def _cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: _cut(folder / "config.json", 40), "config.json can't be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "does not hold a JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file .*model.safetensors"),
        (lambda folder: _cut(folder / "model.safetensors", 100_000), "model.safetensors is cut short"),
        (lambda folder: _cut(folder / "model.safetensors", -1), "model.safetensors is cut short"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle"),
    ],
)
def test_damaged_base_model(damage, sentence, tiny_model_folder, monkeypatch):
    monkeypatch.setenv("COURSE_BASE_MODEL", str(tiny_model_folder))
    assert paths.base_model() == str(tiny_model_folder)
    damage(tiny_model_folder)
    with pytest.raises(InputError, match=sentence):
        paths.base_model()


def test_model_in_several_files(tiny_model, tmp_path, monkeypatch):
    tiny_model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    monkeypatch.setenv("COURSE_BASE_MODEL", str(tmp_path / "sharded"))
    assert paths.base_model() == str(tmp_path / "sharded")
    shards[-1].unlink()
    with pytest.raises(InputError, match=shards[-1].name):
        paths.base_model()


def test_shipped_model_missing_says_how_to_restore_it(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "project_root", lambda: tmp_path)
    with pytest.raises(InputError, match="git checkout"):
        paths.base_model()


# ---------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def shipped_adapter(tiny_model, tmp_path, monkeypatch):
    """A checkout of its own, with one adapter in its models."""
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(paths, "project_root", lambda: tmp_path)
    folder = tmp_path / "models" / "adapters" / "reading"
    get_peft_model(tiny_model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def test_own_folder_is_a_folder_or_says_what_to_put_there(tmp_path):
    assert paths.own_folder(tmp_path) == paths.own_folder(str(tmp_path)) == tmp_path
    (tmp_path / "file").touch()
    for name, sentence in (("missing", "no folder missing"), (str(tmp_path / "file"), "is a file"), (3, "This is 3")):
        with pytest.raises(InputError, match=f"{sentence}.* Put the path of a folder here, or a hub id"):
            paths.own_folder(name)


def test_adapter_path(shipped_adapter):
    assert paths.adapter_path("reading") == shipped_adapter
    with pytest.raises(InputError, match="no adapter 'raeding'.* Choose one of: reading"):
        paths.adapter_path("raeding")


def test_truncated_adapter_is_named(shipped_adapter):
    _cut(shipped_adapter / "adapter_model.safetensors", -10)
    with pytest.raises(InputError, match="reading/adapter_model.safetensors is cut short"):
        paths.adapter_path("reading")


def test_adapter_without_weights(shipped_adapter):
    (shipped_adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="no file .*adapter_model.safetensors"):
        paths.adapter_path("reading")


def test_with_another_base_adapters_come_from_runs(shipped_adapter, tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COURSE_BASE_MODEL", str(tiny_model_folder))
    with pytest.raises(InputError, match="python -m pretraining.adapters"):
        paths.adapter_path("reading")
    shutil.copytree(shipped_adapter, paths.adapters_dir() / "reading")
    assert paths.adapter_path("reading").is_relative_to(tmp_path / "runs" / "adapters")
    # Another folder that happens to bear the same name must not be handed these adapters.
    namesake = tmp_path / "other" / tiny_model_folder.name
    shutil.copytree(tiny_model_folder, namesake)
    monkeypatch.setenv("COURSE_BASE_MODEL", str(namesake))
    with pytest.raises(InputError):
        paths.adapter_path("reading")
