"""The sweeps of lesson 12, each in a few steps: what they write, and what their settings mean."""

import functools

import pytest
import torch

from adapter_checks.errors import InputError
from course_utils import data, paths
from course_utils.picture_model import encode
from course_utils.pictures import SUBJECTS
from experiments import harness, house_words, picture_classifier, picture_style, picture_subject, picturing, run


@pytest.fixture
def few(monkeypatch, tmp_path):
    """A few steps and pictures; returns a function that sweeps some runs and reads them back."""
    for module, sizes in {
        picture_style: {"STEPS": 2, "A_SUBJECT": 1},
        picture_subject: {"STEPS": 2, "PICTURES": 2, "PRIOR": 3, "ASKED": 1, "A_SUBJECT": 1},
        picture_classifier: {"BASE_STEPS": 30, "STEPS": 10, "DRAWINGS": 60, "TESTS": 60},
        house_words: {"STEPS": 2},
    }.items():
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    for module in (picturing, picture_subject):
        monkeypatch.setattr(module, "generate_pictures", functools.partial(module.generate_pictures, steps=2))
    monkeypatch.setattr(paths, "results_dir", lambda: tmp_path)

    def sweep(script, name, runs):
        harness.sweep(name, runs, script.measure, log=lambda line: None, base=run.fingerprint(script))
        return data.load_results(name, tmp_path)

    return sweep


def test_a_style_is_measured_on_taught_and_other_subjects(few):
    rows = few(picture_style, "picture_style", [{"seed": 0, "targets": targets} for targets in ("attention", "full")])
    attention, full = rows
    assert full["trainable"] > 2_000_000 > 100_000 > attention["trainable"]
    assert attention["base"].startswith("sha256-") and attention["base"] != harness.base_fingerprint()
    for group in ("seen", "unseen"):
        assert attention[f"{group}_both"] <= min(attention[f"{group}_subject"], attention[f"{group}_style"]) <= 1
    assert set(picture_style.SEEN) | set(picture_style.UNSEEN) == set(SUBJECTS)


def test_a_seed_decides_where_an_adapter_starts_whatever_ran_before():
    def start(seed):
        model, _ = picturing.adapted("attention", seed)
        return next(weight for name, weight in model.named_parameters() if "lora_A" in name)

    first = start(0)
    torch.rand(1)
    assert torch.equal(start(0), first) and not torch.equal(start(1), first)


def test_each_target_is_a_layer_of_the_model_and_none_is_missing():
    sizes = {}
    for targets in picturing.TARGETS:
        model, weights = picturing.adapted(targets, seed=0)
        sizes[targets] = sum(weight.numel() for weight in weights)
        adapted = [name for name, layer in model.unet.named_modules() if hasattr(layer, "lora_A")]
        for wanted in picturing.TARGETS[targets]:
            assert any(name.endswith(wanted) for name in adapted), wanted
    assert sizes["attention"] < sizes["all"]
    convolutions = [name for name, layer in model.unet.named_modules() if isinstance(layer, torch.nn.Conv2d)]
    left = [name for name in convolutions if "base_layer" not in name and "lora_" not in name]
    assert left == [], "every convolution has an adapter"


def test_a_subject_is_learned_with_and_without_prior_pictures(few, monkeypatch):
    seen, train = [], picturing.train
    monkeypatch.setattr(picturing, "train", lambda *given, prior: seen.append(prior) or train(*given, prior=prior))
    rows = few(picture_subject, "picture_subject", [{"seed": 0, "prior": prior} for prior in ("none", "prior")])
    assert seen[0] is None and len(seen[1][0]) == len(seen[1][1]) == 3
    assert all(0 <= row[column] <= 1 for row in rows for column in ("windmills", "houses_kept", "others_kept"))
    encode(picture_subject.prior_captions())


def test_a_classifier_is_trained_saved_and_switched_off(few):
    methods = ("head", "all", "all, BatchNorm trains", "full")
    rows = few(picture_classifier, "picture_classifier", [{"seed": 0, "method": method} for method in methods])
    head, lora, broken, full = rows
    assert [row["trainable"] for row in rows] == [390, 6916, 6916, 89_798], "the lesson names the last two"
    assert lora["reloaded"] == lora["ink"] and lora["before"] == head["before"] == full["before"]
    base = picture_classifier.make_base()
    day = picture_classifier.accuracy(base, *picture_classifier.rows("day", 60, 50_000))
    assert lora["day_off"] == pytest.approx(day) and broken["day_off"] != pytest.approx(day)


def test_house_words_are_learned_and_the_switch_brings_the_encoder_back(few):
    rows = few(
        house_words, "house_words", [{"seed": 0, "method": method} for method in ("none", "lora", "lora, held", "full")]
    )
    none, lora, held, full = rows
    assert none["trainable"] == 0 and lora["trainable"] == held["trainable"] < full["trainable"] / 20
    assert lora["general_off"] == held["general_off"] == none["general"] > 0.7
    assert none["house_words"] < 0.1 and none["plain_words"] == 1
    assert rows[0]["base"] == harness.base_fingerprint(house_words.base_folder())


def test_the_contrastive_loss_asks_each_question_for_its_own_text():
    texts = torch.eye(3)
    right, wrong = (house_words.contrastive_loss(texts[order], texts).item() for order in ([0, 1, 2], [1, 2, 0]))
    assert right < 1e-6 and wrong == pytest.approx(1 / house_words.TEMPERATURE, abs=1e-3)


def test_results_of_another_picture_model_are_not_mixed(few, monkeypatch):
    runs = [{"seed": 0, "method": "none"}]
    few(house_words, "house_words", runs)
    monkeypatch.setattr(run, "fingerprint", lambda script: "sha256-other")
    with pytest.raises(InputError, match="another base model"):
        few(house_words, "house_words", runs)
