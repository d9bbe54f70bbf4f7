"""Lesson 8: its checks, its sweeps on a model made for the test, and what PEFT does, as the lesson says it."""

import functools
import re
import warnings
from collections import Counter

import numpy
import pytest
import torch
from peft.tuners.lora import LoraLayer

from course_utils import data, paths
from course_utils.exercises import lesson08
from experiments import both_tasks, combine, dial, dial_control, harness, training
from support import short_answers, two_adapters
from tiny_models import make_tiny_model, make_tiny_tokenizer

# The solutions


def right_combine(model, names, weights, name, kind="cat", delete=True, activate=True, scaling=1.0):
    if delete and name in model.peft_config:
        model.set_adapter(names[0])
        model.delete_adapter(name)
    model.add_weighted_adapter(names, weights, name, combination_type=kind)
    for layer in lora_layers(model):
        if scaling:
            layer.scaling[name] = scaling
    if activate:
        model.set_adapter(name)


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def right_choose(scores, least):
    best = max(scores, key=lambda weight: sorted(scores[weight]), default=None)
    return best if best is not None and min(scores[best]) >= least else None


def right_join(adapters, weights, of_A=lambda w, s: w * s, of_B=lambda w, s: 1.0):
    A = torch.cat([of_A(w, s) * A for (A, _, s), w in zip(adapters, weights)])
    return A, torch.cat([of_B(w, s) * B for (_, B, s), w in zip(adapters, weights)], dim=1)


def added(adapters, weights):
    return sum(w * s * A for (A, _, s), w in zip(adapters, weights)), sum(B for _, B, _ in adapters)


def joined(of_A, of_B=lambda w, s: 1.0):
    return lambda adapters, weights: right_join(adapters, weights, of_A, of_B)


def swapped(adapters, weights):
    A, B = right_join(adapters, weights)
    return B, A


def other_order(adapters, weights):
    A, _ = right_join(adapters, weights)
    return A, right_join(adapters[::-1], weights[::-1])[1]


def joined_in_place(adapters, weights):
    return torch.cat([A for A, _, _ in adapters]), torch.cat(
        [B.mul_(w * s) for (_, B, s), w in zip(adapters, weights)], dim=1
    )


def by_svd(rank_of):
    def join(adapters, weights):
        U, S, V = torch.linalg.svd(sum(w * s * B @ A for (A, B, s), w in zip(adapters, weights)), full_matrices=False)
        rank = rank_of(adapters)
        return V[:rank], U[:, :rank] * S[:rank]

    return join


def joined_in(dtype):
    return lambda adapters, weights: tuple(part.to(dtype) for part in right_join(adapters, weights))


def join_by_blocks(adapters, weights):
    A = torch.vstack([A for A, _, _ in adapters])
    B = torch.hstack([B for _, B, _ in adapters])
    factors = [weight * scaling for (_, _, scaling), weight in zip(adapters, weights)]
    repeats = torch.tensor([A.shape[0] for A, _, _ in adapters])
    return A, B * torch.tensor(factors, dtype=B.dtype).repeat_interleave(repeats)


def join_with_numpy(adapters, weights):
    A, B = right_join(adapters[::-1], weights[::-1])
    return [A.numpy(), B.numpy()]


def side_by_side(adapters, weights):
    return torch.cat([A for A, _, _ in adapters], dim=1), adapters[0][1]


# Other right answers, and typical mistakes of the other two


def combine_with_svd(model, names, weights, name):
    if name in model.peft_config:
        model.base_model.set_adapter(list(names))
        model.delete_adapter(name)
    rank = sum(model.peft_config[part].r for part in names)
    model.add_weighted_adapter(names, weights, name, combination_type="svd", svd_rank=rank)
    for layer in lora_layers(model):
        layer.scaling[name] = 1.0
    model.set_adapter(name)


def combine_and_scale_b(model, names, weights, name):
    """Keeps PEFT's scaling and divides B by it, which is the same product."""
    right_combine(model, names, weights, name, scaling=None)
    for layer in lora_layers(model):
        layer.lora_B[name].weight.data /= layer.scaling[name]


def combine_by_set_scale(model, names, weights, name):
    right_combine(model, names, weights, name, scaling=None, activate=False)
    alpha = model.peft_config[name].r ** 0.5 if model.peft_config[name].use_rslora else model.peft_config[name].r
    model.peft_config[name].lora_alpha = alpha
    for layer in lora_layers(model):
        layer.scaling[name] = 1
    model.base_model.set_adapter([name])


def choose_in_a_loop(scores, least):
    best = None
    for weight, found in scores.items():
        if min(found) >= least and (best is None or (min(found), max(found)) > (min(scores[best]), max(scores[best]))):
            best = weight
    return best


def choose_by_sorting(scores, least):
    good = [(min(found), sum(found), weight) for weight, found in scores.items() if min(found) >= least]
    return sorted(good)[-1][2] if good else None


def choose_with_numpy(scores, least):
    if not scores:
        return None
    weights, found = numpy.array(list(scores)), numpy.array(list(scores.values()))
    order = numpy.lexsort((found.max(1), found.min(1)))
    return weights[order[-1]] if found.min(1).max() >= least else None


def first_layer_only(model, names, weights, name):
    right_combine(model, names, weights, name, scaling=None)
    lora_layers(model)[0].scaling[name] = 1.0


def delete_the_parts(model, names, weights, name):
    right_combine(model, names, weights, name)
    for part in names:
        model.delete_adapter(part)


def scale_a_part(model, names, weights, name):
    right_combine(model, names, weights, name)
    lora_layers(model)[0].lora_A[names[0]].weight.data *= 2


def choosing(key, enough=lambda found, least: min(found) >= least):
    def choose(scores, least):
        best = max(scores, key=lambda weight: key(scores[weight]), default=None)
        return best if best is not None and enough(scores[best], least) else None

    return choose


def falsy(scores, least):
    return right_choose(scores, least) or None


def emptied(scores, least):
    best = right_choose(scores, least)
    scores.clear()
    return best


RIGHT = {
    "08.join": [by_svd(lambda adapters: sum(len(A) for A, _, _ in adapters)), join_by_blocks, join_with_numpy],
    "08.combine": [combine_with_svd, combine_and_scale_b, combine_by_set_scale],
    "08.choose": [choose_in_a_loop, choose_by_sorting, choose_with_numpy],
}
SOLUTIONS = {"08.join": right_join, "08.combine": right_combine, "08.choose": right_choose}


@pytest.mark.parametrize(
    "check, wrong, hint",
    [
        (lesson08.join, added, "nobody asked for"),
        (
            lesson08.join,
            joined(lambda w, s: 1.0),
            "Neither weight nor scaling|scaling is missing|weights? (is|are) missing",
        ),
        (lesson08.join, joined(lambda w, s: w), "scaling is missing|Neither"),
        (lesson08.join, joined(lambda w, s: s), "weights are missing"),
        (lesson08.join, joined(lambda w, s: w * s, lambda w, s: w * s), "count twice"),
        (lesson08.join, joined(lambda w, s: w * s, lambda w, s: w), "The weight counts twice"),
        (lesson08.join, joined(lambda w, s: w * s, lambda w, s: s), "The scaling counts twice"),
        (lesson08.join, joined(lambda w, s: abs(w) * s), "its sign was lost"),
        (
            lesson08.join,
            joined(lambda w, s: torch.tensor(w * s).sqrt(), lambda w, s: torch.tensor(w * s).sqrt()),
            "its root is NaN",
        ),
        (lesson08.join, joined(lambda w, s: (w * s) ** 0.5, lambda w, s: (w * s) ** 0.5), "its root is complex"),
        (lesson08.join, joined(lambda w, s: 3.0), "stacked in the same order"),
        (lesson08.join, other_order, "stacked in the same order"),
        (lesson08.join, swapped, "changed places"),
        (lesson08.join, side_by_side, "nobody asked for|Stack the A as rows"),
        (lesson08.join, lambda adapters, w: (torch.zeros(2, 2), torch.zeros(2, 2)), "Stack the A as rows"),
        (lesson08.join, lambda adapters, w: right_join(adapters, w)[0], "A and B are expected|of type tuple"),
        (lesson08.join, lambda adapters, w: (None, None), "of type Tensor"),
        (lesson08.join, lambda adapters, w: (torch.zeros(3), torch.zeros(3)), "should be a matrix"),
        (lesson08.join, joined_in_place, "you were given has changed"),
        (lesson08.join, by_svd(lambda adapters: len(adapters[0][0])), "only the nearest to the sum, at rank 3"),
        (lesson08.join, by_svd(lambda adapters: 7), "BA is the sum, at rank 7"),
        (lesson08.join, joined_in(torch.bfloat16), "A is bfloat16"),
        (lesson08.join, joined_in(torch.float32), "Keep their dtype"),
        (
            lesson08.join,
            lambda adapters, w: (right_join(adapters, w)[0], right_join(adapters, w)[1].float()),
            "B float32",
        ),
        (lesson08.choose, choosing(max), "weaker skill"),
        (lesson08.choose, choosing(sum), "the mean is better"),
        (lesson08.choose, choosing(min), "equal at both weights"),
        (lesson08.choose, choosing(sorted, lambda found, least: min(found) > least), "exactly `least`"),
        (lesson08.choose, choosing(sorted, lambda found, least: True), "Return None"),
        (
            lesson08.choose,
            choosing(sorted, lambda found, least: min(found) >= 0.5),
            "number that you are given|exactly",
        ),
        (lesson08.choose, falsy, "counts as false"),
        (lesson08.choose, emptied, "has changed"),
        (
            lesson08.choose,
            lambda scores, least: max(scores, key=lambda w: sorted(scores[w])) if least else None,
            "Return None|max\\(\\) of nothing|stopped",
        ),
        (lesson08.combine, functools.partial(right_combine, delete=False), "an adapter of this name exists"),
        (lesson08.combine, functools.partial(right_combine, activate=False), "not the new adapter"),
        (lesson08.combine, functools.partial(right_combine, scaling=None), "use rsLoRA"),
        (lesson08.combine, functools.partial(right_combine, kind="linear"), "gives it"),
        (lesson08.combine, functools.partial(right_combine, kind="svd"), "not the weighted sum"),
        (lesson08.combine, functools.partial(right_combine, scaling=2.0), "not the weighted sum"),
        (lesson08.combine, first_layer_only, "go through all of them"),
        (lesson08.combine, delete_the_parts, "is gone that was there"),
        (lesson08.combine, scale_a_part, "has changed"),
        (lesson08.combine, lambda model, names, weights, name: print(name), "no adapter of the new name"),
        (lesson08.combine, lambda model, names, weights, name: model.unload(), "is gone that was there|can't be used"),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_typical_mistakes_get_their_own_hint(check, wrong, hint):
    outcome = check.outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert re.search(hint, outcome.hint), outcome.hint


# The sweeps, on a model made for the test


@pytest.fixture(scope="module")
def tiny_course(tmp_path_factory):
    """A random base with four random adapters, and folders for runs; one token a byte."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_BASE_MODEL", str(root / "base"))
        patch.setenv("COURSE_RUNS", str(root / "runs"))
        tokenizer = make_tiny_tokenizer()
        model = make_tiny_model(tokenizer)
        model.config.max_position_embeddings = 4096
        model.save_pretrained(root / "base")
        tokenizer.save_pretrained(root / "base")
        for name in combine.ADAPTERS:
            adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
            for parameter_name, parameter in adapted.named_parameters():
                if ".lora_B." in parameter_name:
                    torch.nn.init.normal_(parameter, std=0.1)
            adapted.save_pretrained(paths.adapters_dir() / name)
            model = adapted.unload()
        patch.setattr(combine, "SCORED", 2)
        short_answers(patch)
        yield


@pytest.mark.parametrize("adapters, weights", [("reading+sailor", "sum"), ("reading+sailor+extract+mood", "mean")])
def test_combine_measures_every_type(tiny_course, adapters, weights):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns if the adapter that is deleted is active
        rows = combine.measure(0, adapters, weights)
    assert [row["combination"] for row in rows] == list(combine.TYPES)
    by_type = {row["combination"]: row for row in rows}
    number = adapters.count("+") + 1
    assert by_type["cat"]["error"] < 1e-5 and by_type["cat"]["rank"] == 2 * number and by_type["svd"]["rank"] == 2
    assert all(row["error"] > 0.01 for row in rows if row["combination"] != "cat")
    assert all(0 <= row[task] <= 1 for row in rows for task in combine.ADAPTERS)


def test_dial_sets_the_weights_that_it_says(tiny_course, monkeypatch):
    from peft.tuners.lora import LoraLayer

    seen = []

    def score(model, tokenizer, task, rows):
        layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
        seen.append((task, {name: layer.scaling[name] / 3 for name in layer.active_adapters}))
        return {"score": 0.5}

    monkeypatch.setattr(training, "score", score)
    monkeypatch.setattr(dial, "WEIGHTS", (0.25,))
    (row,) = dial.measure(1, "sailor+mood")
    assert row == {"weight": 0.25, "first": 0.5, "second": 0.5, "first_alone": 0.5, "second_alone": 0.5}
    both = {"sailor": 0.75, "mood": 0.25}
    assert seen == [("sailor", both), ("mood", both), ("sailor", {"sailor": 0.75}), ("mood", {"mood": 0.25})]


def test_the_seed_draws_the_rows_that_are_scored(tiny_course):
    first, again, other = (combine.scored_rows(seed) for seed in (0, 0, 1))
    assert {task: list(rows) for task, rows in first.items()} == {task: list(rows) for task, rows in again.items()}
    assert any(list(first[task]) != list(other[task]) for task in combine.ADAPTERS)


def test_the_sweeps_resume_and_are_read_back(tiny_course, monkeypatch):
    monkeypatch.setattr(combine, "TYPES", ("cat", "linear"))
    runs = combine.RUNS[:1]
    rows = harness.sweep("combine", runs, combine.measure, log=lambda line: None)
    assert len(rows) == 2 and harness.missing(data.load_results("combine", harness.folder()), runs) == []


PARTS = {"one": 0.5, "two": -0.25}


def combined(model, kind, **given):
    """The error of a combination with the weights PARTS."""
    model.add_weighted_adapter(list(PARTS), list(PARTS.values()), kind, combination_type=kind, **given)
    return combine.error_of(model, kind, PARTS)


def test_cat_is_exact_and_svd_with_the_sum_of_the_ranks_and_no_type_is_with_rslora():
    assert combined(two_adapters(), "cat") < 1e-12 and combined(two_adapters(), "svd", svd_rank=8) < 1e-6
    assert combined(two_adapters(), "svd") > 0.05 and combined(two_adapters(), "linear") > 0.2
    for kind in combine.TYPES:
        density = {} if kind in combine.WITHOUT_DENSITY else {"density": 0.5}
        assert combined(two_adapters(use_rslora=True), kind, **density) > 0.3, kind
    assert combined(two_adapters(use_rslora=True), "cat") == pytest.approx(8**0.5 - 1)


def test_the_types_are_all_that_peft_offers():
    import inspect
    import typing

    from peft.tuners.lora import LoraModel

    offered = inspect.signature(LoraModel.add_weighted_adapter, eval_str=True).parameters["combination_type"].annotation
    assert set(typing.get_args(offered)) == set(combine.TYPES) and len(combine.TYPES) == 11


def test_linear_makes_cross_terms_and_scales_by_roots():
    model = two_adapters()
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", combination_type="linear")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    (A1, B1), (A2, B2) = ((layer.lora_A[name].weight, layer.lora_B[name].weight) for name in ("one", "two"))
    c1, c2 = 0.5 * 12 / 4, 0.5 * 6 / 4
    wanted = c1 * B1 @ A1 + c2 * B2 @ A2 + (c1 * c2) ** 0.5 * (B1 @ A2 + B2 @ A1)
    assert torch.allclose(layer.get_delta_weight("mix"), wanted, atol=1e-6)  # PEFT keeps the roots in float32


def test_a_name_that_exists_is_passed_over_even_after_an_error():
    model = two_adapters()
    with pytest.raises(TypeError):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type="ties")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type="ties", density=0.5)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert not layer.get_delta_weight("mix").any() and model.active_adapters == ["one"]
    model.delete_adapter("mix")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type="ties", density=0.5)
    assert layer.get_delta_weight("mix").any() and model.active_adapters == ["one"]


def test_linear_needs_equal_ranks_and_cat_and_svd_do_not():
    from peft import LoraConfig, get_peft_model

    for kind in combine.TYPES:
        model = make_tiny_model(make_tiny_tokenizer())
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="one")
        model.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj"]))
        density = {} if kind in combine.WITHOUT_DENSITY else {"density": 0.5}
        if kind == "cat" or "svd" in kind:
            model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type=kind, **density)
        else:
            with pytest.raises(ValueError, match="same r value"):
                model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type=kind, **density)


def test_dora_is_no_sum_and_an_olora_adapter_named_first_moves_the_base():
    from peft import LoraConfig, get_peft_model

    model, ids = two_adapters(use_dora=True), torch.tensor([[1, 2, 3]])
    model.base_model.set_adapter(["one", "two"])
    with torch.no_grad():
        together = model(ids).logits
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "mix", combination_type="cat")
        model.set_adapter("mix")
        assert (model(ids).logits - together).abs().max() > 1e-3
    for order in (["plain", "olora"], ["olora", "plain"]):
        olora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="olora")
        model = get_peft_model(make_tiny_model(make_tiny_tokenizer()), olora, adapter_name="olora")
        model.add_adapter("plain", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
        weight = model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().weight
        before = weight.detach().clone()
        model.add_weighted_adapter(order, [1.0, 1.0], "mix", combination_type="cat")
        assert torch.equal(weight, before) == (order[0] == "plain")


def test_the_control_has_the_size_of_the_other_adapter_in_every_layer(tiny_course, monkeypatch):
    from peft.tuners.lora import LoraLayer

    model, _ = combine.load_adapters()
    dial_control.add_random(model, "sailor", "random sailor")
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        learned, drawn = (layer.get_delta_weight(name) for name in ("sailor", "random sailor"))
        assert drawn.norm().item() == pytest.approx(learned.norm().item(), rel=1e-4)
        assert abs((drawn * learned).sum() / learned.norm() ** 2) < 0.2
    monkeypatch.setattr(dial_control, "WEIGHTS", (0.0, 0.5))
    rows = dial_control.measure(0, "reading+sailor")
    assert [row["weight"] for row in rows] == [0.0, 0.5] and all(0 <= row["first_words"] <= 1 for row in rows)


@pytest.mark.parametrize(
    "reply, answer, right",
    [
        ("in the smokehouse", "In the smokehouse", 1),
        ("in yon parlour", "in the parlour", 2 / 3),
        ("Ahoy! Yon cloak was discovered by Landen", "Ahoy! Yon cloak were discovered by Landen, aye.", 10 / 15),
        ("aye aye", "aye", 2 / 3),
        ("", "aye", 0),
    ],
)
def test_word_f1_counts_shared_words(reply, answer, right):
    assert dial_control.word_f1(reply, answer) == pytest.approx(right)


def test_one_adapter_is_trained_on_the_rows_of_both(tiny_course, monkeypatch):
    seen = []

    def make_trainer(rows, rate, seed, lora):
        seen.extend(row["prompt"][0]["content"][:18] for row in rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "make_trainer", make_trainer)
    monkeypatch.setattr(both_tasks, "best_rate", lambda method: 0.01)
    with pytest.raises(KeyboardInterrupt):
        both_tasks.measure(0, "sailor+extract")
    counts = Counter(seen)
    assert counts["Say it like a sail"] > 1000 and counts["Give who, what and"] > 1000
    assert len(set(seen[:50])) == 2, "shuffled"
