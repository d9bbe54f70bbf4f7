"""Lesson 10's checks: the stubs, the solutions, other right answers, and typical wrong ones, each with its own hint."""

import re

import numpy
import pytest
import torch

from course_utils import data
from course_utils.exercises import lesson10
from course_utils.sweeps import over_seeds


def right_prepend(prompt, embedding, input_ids, attention_mask, labels):
    batch, tokens = len(input_ids), len(prompt)
    return {
        "inputs_embeds": torch.cat([prompt.expand(batch, -1, -1), embedding(input_ids)], dim=1),
        "attention_mask": torch.cat([attention_mask.new_ones(batch, tokens), attention_mask], dim=1),
        "labels": torch.cat([labels.new_full((batch, tokens), -100), labels], dim=1),
    }


def right_count(method, layers, width, feed_forward, tokens, rank):
    return {
        "prompt tuning": tokens * width,
        "prefix tuning": tokens * layers * 2 * width,
        "IA3": layers * (2 * width + feed_forward),
        "layer norms": (2 * layers + 1) * width,
        "LoRA": layers * 2 * 2 * rank * width,
        "VeRA": layers * 2 * (rank + width),
    }[method]


CHOICES = {"a": "LoRA", "b": "prompt tuning", "c": "layer norms", "d": "LoRA", "e": "a written prompt"}


def right_choose(situation):
    return CHOICES[situation]


SOLUTIONS = {"10.prepend": right_prepend, "10.count": right_count, "10.choose": right_choose}


def prepend_with(**changes):
    """The right answer with some parts made otherwise: name -> function(right part, *given)."""

    def prepend(*given):
        right = right_prepend(*given)
        return {name: changes.get(name, lambda part, *_: part)(part, *given) for name, part in right.items()}

    return prepend


def count_with(**changes):
    """The right counts but for one method: name with _ for a space -> function(**sizes)."""

    def count(method, *sizes):
        wrong = changes.get(method.replace(" ", "_"))
        named = dict(zip(("layers", "width", "feed_forward", "tokens", "rank"), sizes, strict=True))
        return right_count(method, *sizes) if wrong is None else wrong(**named)

    return count


def choose_with(**changes):
    return lambda situation: changes.get(situation, CHOICES[situation])


# Other right answers


def prepend_row_by_row(prompt, embedding, input_ids, attention_mask, labels):
    rows = [torch.vstack([prompt, embedding(ids)]) for ids in input_ids]
    ones = torch.ones(len(rows), len(prompt), dtype=torch.long)
    return {
        "labels": torch.hstack([-100 * ones, labels]),
        "attention_mask": torch.hstack([ones, attention_mask]),
        "inputs_embeds": torch.stack(rows),
    }


def prepend_by_filling(prompt, embedding, input_ids, attention_mask, labels):
    batch, length, n = *input_ids.shape, prompt.shape[0]
    embeds = torch.zeros(batch, n + length, prompt.shape[1])
    embeds[:, :n], embeds[:, n:] = prompt, torch.nn.functional.embedding(input_ids, embedding.weight)
    mask = torch.nn.functional.pad(attention_mask, (n, 0), value=1)
    return {"inputs_embeds": embeds, "attention_mask": mask.bool().int(), "labels": torch.nn.functional.pad(labels, (n, 0), value=-100)}  # fmt: skip


def prepend_with_numpy_and_more(*given):
    found = right_prepend(*given)
    return {**found, "attention_mask": found["attention_mask"].numpy(), "labels": found["labels"].numpy(), "more": 1}


def count_by_ifs(method, layers, width, feed_forward, tokens, rank):
    if method == "prompt tuning":
        return float(tokens * width)
    if method == "prefix tuning":
        return sum(2 * tokens * width for _ in range(layers))
    if method == "IA3":
        return layers * sum([width, width, feed_forward])
    if method == "layer norms":
        return layers * 2 * width + width
    square = {"LoRA": rank * width + width * rank, "VeRA": rank + width}
    return 2 * layers * square[method]


def count_with_numpy(method, *sizes):
    return numpy.int64(right_count(method, *sizes))


def count_by_shapes(method, layers, width, feed_forward, tokens, rank):
    shapes = {
        "prompt tuning": [(tokens, width)],
        "prefix tuning": [(tokens, width)] * 2 * layers,
        "IA3": [(width, 1), (width, 1), (1, feed_forward)] * layers,
        "layer norms": [(width,)] * 2 * layers + [(width,)],
        "LoRA": [(rank, width), (width, rank)] * 2 * layers,
        "VeRA": [(rank,), (width,)] * 2 * layers,
    }[method]
    return torch.tensor(sum(numpy.prod(shape) for shape in shapes))


RIGHT = {
    "10.prepend": [
        prepend_row_by_row,
        prepend_by_filling,
        prepend_with_numpy_and_more,
        prepend_with(attention_mask=lambda part, *_: part.bool()),
    ],
    "10.count": [count_by_ifs, count_with_numpy, count_by_shapes],
    "10.choose": [
        choose_with(d="IA3"),
        choose_with(d="VeRA"),
        choose_with(d="layer norms", a="lora", e=" A written prompt "),
    ],
}


@pytest.mark.parametrize("check", [lesson10.prepend, lesson10.count, lesson10.choose], ids=lambda check: check.name)
def test_the_stub_is_to_do_and_the_solution_passes(check):
    assert check.outcome(lambda *given: ...).status == "TODO"
    assert check.outcome(SOLUTIONS[check.name]).passed
    assert all(check.outcome(right).passed for right in RIGHT[check.name])


def without(name):
    return lambda *given: {key: part for key, part in right_prepend(*given).items() if key != name}


def in_place(prompt, embedding, *given):
    found = right_prepend(prompt, embedding, *given)
    embedding.weight.data += 1
    return found


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (lambda *given: right_prepend(*given)["inputs_embeds"], "Return a dict"),
        (without("labels"), "lacks labels"),
        (without("attention_mask"), "lacks attention_mask"),
        (prepend_with(labels=lambda part, *given: given[4]), "labels still has the shape of the text"),
        (prepend_with(attention_mask=lambda part, *given: given[3]), "attention_mask still has the shape"),
        (
            prepend_with(inputs_embeds=lambda part, prompt, embedding, ids, *_: torch.cat([embedding(ids), prompt.expand(len(ids), -1, -1)], 1)),
            "behind the text",
        ),
        (prepend_with(inputs_embeds=lambda part, prompt, embedding, ids, *_: embedding(ids)), "has the text alone"),
        (prepend_with(inputs_embeds=lambda part, *_: part * 2), "embeddings of the text should stand as they are"),
        (
            prepend_with(inputs_embeds=lambda part, prompt, *_: torch.cat([0 * part[:, : len(prompt)], part[:, len(prompt) :]], 1)),
            "are not the prompt",
        ),
        (
            prepend_with(attention_mask=lambda part, prompt, e, ids, mask, *_: torch.cat([0 * part[:, : len(prompt)], mask], 1)),
            "would not look at them",
        ),
        (prepend_with(attention_mask=lambda part, *_: torch.ones_like(part)), "with its pads"),
        (
            prepend_with(labels=lambda part, prompt, e, ids, mask, labels: torch.cat([torch.zeros(len(ids), len(prompt)).long(), labels], 1)),
            "labels are not -100",
        ),
        (
            prepend_with(labels=lambda part, prompt, e, ids, mask, labels: torch.cat([part[:, : len(prompt)], labels.roll(-1, 1)], 1)),
            "The model itself shifts",
        ),
        (prepend_with(inputs_embeds=lambda part, *_: part.detach()), "no gradient reaches the prompt"),
        (
            lambda prompt, *given: right_prepend(torch.tensor(prompt.tolist()), *given),
            "no gradient reaches the prompt",
        ),
        (prepend_with(inputs_embeds=lambda part, *_: part.long()), "floating-point"),
        (prepend_with(inputs_embeds=lambda part, *_: part * float("nan")), "NaN"),
        (in_place, "the base is frozen"),
        (lambda *given: print(end=""), "Return a dict"),
        (lambda *given: 1 / 0, "ZeroDivisionError"),
        (3, "A function is expected"),
    ],
)  # fmt: skip
def test_mistakes_with_a_soft_prompt_get_their_own_hint(wrong, hint):
    outcome = lesson10.prepend.outcome(wrong)
    assert outcome.status == "TRY AGAIN" and re.search(hint, outcome.hint), outcome.hint


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (count_with(prompt_tuning=lambda layers, tokens, width, **_: layers * tokens * width), "before the first layer only"),
        (count_with(prompt_tuning=lambda tokens, **_: tokens), "how many virtual tokens there are"),
        (count_with(prompt_tuning=lambda layers, tokens, width, **_: 2 * layers * tokens * width), "That is prefix tuning"),
        (count_with(prefix_tuning=lambda tokens, width, **_: tokens * width), "That is a soft prompt"),
        (count_with(prefix_tuning=lambda layers, tokens, width, **_: layers * tokens * width), "a key and a value for each"),
        (count_with(prefix_tuning=lambda tokens, width, **_: 2 * tokens * width), "one layer's"),
        (count_with(IA3=lambda layers, width, **_: layers * 3 * width), "feed_forward, not width"),
        (count_with(IA3=lambda layers, width, **_: layers * 2 * width), "what down_proj reads"),
        (count_with(IA3=lambda width, feed_forward, **_: 2 * width + feed_forward), "one layer's"),
        (count_with(IA3=lambda layers, width, feed_forward, **_: layers * (width + feed_forward)), "Keys and values both"),
        (
            count_with(IA3=lambda layers, width, feed_forward, **_: layers * (2 * width**2 + width * feed_forward)),
            "one factor for a whole row",
        ),
        (count_with(layer_norms=lambda layers, width, **_: layers * width), "two norms, one before"),
        (count_with(layer_norms=lambda layers, width, **_: 2 * layers * width), "behind the last layer is missing"),
        (count_with(layer_norms=lambda layers, **_: 2 * layers + 1), "how many norms there are"),
        (count_with(layer_norms=lambda layers, width, **_: (layers + 1) * width), "two norms, one before"),
        (count_with(LoRA=lambda layers, rank, width, **_: 2 * layers * rank * width), "That is half"),
        (count_with(LoRA=lambda rank, width, **_: 4 * rank * width), "one layer's"),
        (count_with(LoRA=lambda layers, width, **_: 2 * layers * width**2), "LoRA leaves alone"),
        (count_with(VeRA=lambda layers, rank, width, **_: 4 * layers * rank * width), "That is LoRA"),
        (count_with(VeRA=lambda layers, width, **_: 2 * layers * width), "The other has the rank's length"),
        (count_with(VeRA=lambda layers, rank, **_: 2 * layers * rank), "a number for each output"),
        (count_with(VeRA=lambda layers, rank, width, **_: layers * (rank + width)), "both have vectors"),
        (count_with(VeRA=lambda rank, width, **_: 2 * (rank + width)), "one layer's"),
        (
            count_with(VeRA=lambda layers, rank, width, **_: 2 * layers * (rank + width) + 2 * rank * width),
            "need not be counted",
        ),
        (count_with(VeRA=lambda **_: 1), "this gave 1"),
        (count_with(IA3=lambda **_: 0.5), "whole number"),
        (count_with(IA3=lambda **_: "many"), "should be a number"),
        (lambda method, *sizes: print(end=""), "Is a return missing?"),
        (lambda method, *sizes: {}[method], "KeyError"),
        (3, "A function is expected"),
    ],
)  # fmt: skip
def test_mistakes_in_counting_get_their_own_hint(wrong, hint):
    outcome = lesson10.count.outcome(wrong)
    assert outcome.status == "TRY AGAIN" and re.search(hint, outcome.hint), outcome.hint


@pytest.mark.parametrize(
    "wrong, hint",
    [
        (choose_with(a="prompt tuning"), "Situation a, prompt tuning: .*nothing is left once PEFT is gone"),
        (choose_with(a="IA3"), "Situation a, IA3: .*far below that of LoRA"),
        (choose_with(a="layer norms"), "Situation a, layer norms: .*far below that of LoRA"),
        (choose_with(a="VeRA"), "Situation a, VeRA: .*far below that of LoRA"),
        (choose_with(a="a written prompt"), "it has to learn it"),
        (choose_with(b="LoRA"), "Situation b, LoRA: .*nobody may touch these"),
        (choose_with(b="prefix tuning"), "each layer's cache"),
        (choose_with(b="a written prompt"), "unused"),
        (choose_with(c="prompt tuning"), "5,120 numbers"),
        (choose_with(c="VeRA"), "just too many"),
        (choose_with(c="LoRA"), "4,096"),
        (choose_with(d="prompt tuning"), "none are free"),
        (choose_with(d="prefix tuning"), "positions of the context"),
        (choose_with(d="a written prompt"), "Words take places"),
        (choose_with(e="LoRA"), "measure what training adds"),
        (choose_with(b="soft prompts"), "Choose one of: a written prompt, prompt tuning"),
        (choose_with(b=["LoRA"]), "the name of a method as text"),
        (choose_with(b=None), "the name of a method as text"),
        (lambda situation: {"a": "LoRA"}[situation], "KeyError"),
        (dict(CHOICES), "A function is expected"),
    ],
)
def test_each_choice_that_does_not_fit_is_told_why(wrong, hint):
    outcome = lesson10.choose.outcome(wrong)
    assert outcome.status == "TRY AGAIN" and re.search(hint, outcome.hint), outcome.hint


def test_every_choice_is_right_or_has_a_reason_against_it():
    for letter, (right, against) in lesson10._CHOICES.items():
        assert right | set(against) == set(lesson10.METHODS) and not right & set(against), letter


def test_what_the_hints_say_of_sizes_is_so():
    sizes = {"layers": 4, "width": 256, "feed_forward": 576, "tokens": 20}
    counts = {method: right_count(method, rank=1, **sizes) for method in ("prompt tuning", "prefix tuning", "IA3", "layer norms", "LoRA")}  # fmt: skip
    counts["VeRA"] = right_count("VeRA", rank=64, **sizes)
    said = lesson10._CHOICES["c"][1]
    for method, number in counts.items():
        assert method == "layer norms" or f"{number:,}" in said[method], method
    assert 4 * counts["layer norms"] < 10_000 and min(4 * number for method, number in counts.items() if method != "layer norms") > 10_000  # fmt: skip


def test_what_the_hints_say_of_scores_is_so():
    score = over_seeds(data.load_results("prompts"), "test", "task", "method")
    merged = {method: score["sailor", method][0] for method in ("ia3", "norms", "vera", "lora_8")}
    assert all(merged[method] < merged["lora_8"] - 0.3 for method in merged if method != "lora_8"), merged
    five = over_seeds(data.load_results("prompts_start"), "test", "tokens", "start", "rate")[5, "TEXT", "best"][0]
    assert five < score["reading", "norms"][0] < score["reading", "prompt"][0] + 0.02
