"""The checks of lesson 2: the stub is to do, the solution passes, each typical mistake gets its own hint."""

import math
import re
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from adapter_checks import counting
from course_utils.exercises import lesson02
from tools import build, editions

SOURCE = Path(build.ROOT, "lessons", "02_lora_from_scratch.py").read_text(encoding="utf-8")
LESSON = editions.parse(SOURCE)


def from_the_lesson(name):
    """The class or function `name` as the lesson defines it."""
    source = next(
        cell.source for cell in LESSON.cells if re.search(rf"^(class|def) {name}\b", cell.source, flags=re.MULTILINE)
    )
    names = {"math": math, "nn": nn, "torch": torch}
    exec(compile(source, name, "exec"), names)
    return names[name]


LoRALinear = from_the_lesson("LoRALinear")


# The solutions


def right_inject(model, names, rank, alpha, make=LoRALinear, matches=None):
    matches = matches or (lambda name: name.split(".")[-1] in names)
    model.requires_grad_(False)
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and matches(name)]
    for name in targets:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, make(model.get_submodule(name), rank, alpha))
    return len(targets)


def right_count(shapes, rank):
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes)


def right_truncate(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def right_merge(weight, A, B, alpha, use_rslora):
    rank = A.shape[0]
    return weight + alpha / (math.sqrt(rank) if use_rslora else rank) * (B @ A).T


# Other right answers


def inject_by_parents(model, names, rank, alpha):
    for parameter in model.parameters():
        parameter.requires_grad = False
    number = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in names and type(child) is nn.Linear:
                parent.register_module(name, LoRALinear(child, rank, alpha))
                number += 1
    return torch.tensor(number)


def inject_by_set_submodule(model, names, rank, alpha):
    model.requires_grad_(False)
    found = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in set(names) and isinstance(m, nn.Linear)}
    for name, module in found.items():
        model.set_submodule(name, LoRALinear(module, rank, alpha))
    return len(found)


def inject_downwards(model, names, rank, alpha, top=True):
    if top:
        model.requires_grad_(False)
    number = 0
    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            if name in names:
                setattr(model, name, LoRALinear(child, rank, alpha))
                number += 1
        else:
            number += inject_downwards(child, names, rank, alpha, top=False)
    return float(number)


def count_on_meta(shapes, rank):
    with torch.device("meta"):
        pairs = [(nn.Linear(i, rank, bias=False), nn.Linear(rank, o, bias=False)) for i, o in shapes]
    return sum(part.weight.numel() for pair in pairs for part in pair)


def truncate_from_eigenvectors(matrix, rank):
    kept = torch.linalg.eigh(matrix.T @ matrix)[1][:, -rank:]
    return matrix @ kept @ kept.T


def truncate_a_direction_at_a_time(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix)
    return sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(rank))


def truncate_with_numpy(matrix, rank):
    U, S, Vh = numpy.linalg.svd(matrix.numpy(), full_matrices=False)
    S[rank:] = 0
    return U @ numpy.diag(S) @ Vh


def merge_by_peft(weight, A, B, alpha, use_rslora):
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    base = nn.Sequential(Conv1D(weight.shape[1], weight.shape[0]).double())
    base[0].weight.data = weight.clone()
    config = LoraConfig(r=len(A), lora_alpha=alpha, target_modules=["0"], fan_in_fan_out=True, use_rslora=use_rslora)
    model = get_peft_model(base, config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
    return model.merge_and_unload()[0].weight


def merge_turned(weight, A, B, alpha, use_rslora):
    r, _ = A.shape
    return weight.add(A.T @ B.T, alpha=alpha * r ** (-0.5 if use_rslora else -1))


def merge_with_numpy(weight, A, B, alpha, use_rslora):
    scaling = alpha / (len(A) ** 0.5 if use_rslora else len(A))
    return weight.numpy() + scaling * numpy.einsum("or,ri->io", B.numpy(), A.numpy())


RIGHT = {
    "02.inject": [inject_by_parents, inject_by_set_submodule, inject_downwards],
    "02.count": [
        count_on_meta,
        lambda shapes, rank: rank * numpy.array(shapes).sum(),
        lambda shapes, rank: sum(map(sum, shapes)) * rank,
    ],
    "02.truncate": [truncate_from_eigenvectors, truncate_a_direction_at_a_time, truncate_with_numpy],
    "02.merge": [merge_by_peft, merge_turned, merge_with_numpy],
}


# Typical mistakes


def train_all(model, names, rank, alpha):
    number = right_inject(model, names, rank, alpha)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return number


def freeze_last(model, names, rank, alpha):
    number = right_inject(model, names, rank, alpha)
    model.requires_grad_(False)
    return number


def only_count(model, names, rank, alpha):
    return sum(name.split(".")[-1] in names for name, _ in model.named_modules())


def new_layer(base_layer, rank, alpha):
    """A LoRA layer around fresh weights instead of the old ones."""
    layer = nn.Linear(base_layer.in_features, base_layer.out_features, bias=False, dtype=torch.float64)
    return LoRALinear(layer, rank, alpha)


def dotted(model, names, rank, alpha):
    """setattr on the model itself, with the whole name."""
    model.requires_grad_(False)
    targets = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.split(".")[-1] in names
    ]
    for name in targets:
        setattr(model, name, LoRALinear(model.get_submodule(name), rank, alpha))
    return len(targets)


def any_module(model, names, rank, alpha, make=LoRALinear):
    """Whatever is called so, be it a linear layer or not."""
    model.requires_grad_(False)
    targets = [name for name, _ in model.named_modules() if name.split(".")[-1] in names]
    for name in targets:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, make(model.get_submodule(name), rank, alpha))
    return len(targets)


def random_b(base_layer, rank, alpha):
    layer = LoRALinear(base_layer, rank, alpha)
    nn.init.normal_(layer.lora_B)
    return layer


def unscaled(base_layer, rank, alpha):
    layer = LoRALinear(base_layer, rank, alpha)
    layer.scaling = alpha
    return layer


def one_matrix(base_layer, rank, alpha):
    layer = LoRALinear(base_layer, rank, alpha)
    layer.lora_A = None
    return layer


def only_first_rows(matrix, rank):
    kept = torch.zeros_like(matrix)
    kept[:rank] = matrix[:rank]
    return kept


def closest_by_size(matrix, below):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U * S * (S > below) @ Vh


def by_division(matrix, rank):
    """U from M V / S, which is 0 / 0 where there is nothing to keep."""
    squares, V = torch.linalg.eigh(matrix.T @ matrix)
    sizes, V = squares[-rank:].clamp(min=0).sqrt(), V[:, -rank:]
    return (matrix @ V / sizes.round(decimals=6)) * sizes @ V.T


def in_place(matrix, rank):
    return matrix.copy_(right_truncate(matrix, rank))


def turned(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:, :rank].T


def smallest(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, -rank:] * S[-rank:] @ Vh[-rank:]


def merged_with(scaling):
    def merge(weight, A, B, alpha, use_rslora):
        return weight + scaling(alpha, A.shape[0]) * (B @ A).T

    return merge


def merged_in_place(weight, A, B, alpha, use_rslora):
    weight += right_merge(weight, A, B, alpha, use_rslora) - weight
    return weight


def narrow(old, rank, alpha):
    """A layer that gives the first of its outputs only."""
    layer = LoRALinear(old, rank, alpha)
    forward = layer.forward
    layer.forward = lambda x: forward(x)[..., :1]
    return layer


@pytest.mark.parametrize(
    "check, wrong, hint",
    [
        (lesson02.inject, train_all, "still trainable"),
        (lesson02.inject, freeze_last, "A and B are frozen"),
        (lesson02.inject, only_count, "Set the new layer on its parent"),
        (
            lesson02.inject,
            lambda m, names, r, a: right_inject(m, names, r, a, matches=lambda n: "proj" in n),
            "was replaced, and",
        ),
        (
            lesson02.inject,
            lambda m, names, r, a: right_inject(m, names, r, a, matches=lambda n: n.endswith(tuple(names))),
            "lm_head was replaced",
        ),
        (
            lesson02.inject,
            lambda m, names, r, a: right_inject(m, names, r, a) and len(names),
            "Count the layers, not the names",
        ),
        (lesson02.inject, lambda m, names, r, a: right_inject(m, names, r, a, make=new_layer), "weights are gone"),
        (lesson02.inject, dotted, "under a name with dots"),
        (lesson02.inject, any_module, "mlp is the name of a block.*Your code stopped with AttributeError"),
        (
            lesson02.inject,
            lambda m, names, r, a: any_module(
                m,
                names,
                r,
                a,
                make=lambda old, *_: LoRALinear(old, r, a) if hasattr(old, "weight") else nn.Sequential(old),
            ),
            "mlp is the name of a block",
        ),
        (lesson02.inject, lambda m, names, r, a: right_inject(m, names, r, a, make=random_b), "leave B zero"),
        (
            lesson02.inject,
            lambda m, names, r, a: right_inject(m, names, r, a, make=unscaled),
            "not \\(alpha / rank\\)·BA",
        ),
        (lesson02.inject, lambda m, names, r, a: right_inject(m, names, a, r), "passed on in the right order"),
        (lesson02.inject, lambda m, names, r, a: right_inject(m, names, r, a, make=one_matrix), "A and B for each"),
        (
            lesson02.inject,
            lambda m, names, r, a: right_inject(m, names, r, a, make=narrow),
            "The model after your function can't be used: RuntimeError",
        ),
        (lesson02.inject, lambda m, names, r, a: print(right_inject(m, names, r, a)), "Is a return missing"),
        (
            lesson02.inject,
            lambda m, names, r, a: right_inject(
                m, names, r, a, matches=lambda n: n.split(".")[-1].startswith(tuple(names))
            ),
            "was replaced, and",
        ),
        (
            lesson02.inject,
            lambda m, names, r, a: right_inject(
                m, names, r, a, matches=lambda n: "." in n and n.split(".")[-1] in names
            ),
            "Nothing was replaced at lm_head",
        ),
        (lesson02.inject, lambda m, names, r, a: right_inject(m, names, 3, 12), "passed on in the right order"),
        (
            lesson02.count,
            lambda shapes, rank: sum(
                rank * (i + o) for i, o in [s for n, s in enumerate(shapes) if s != shapes[n - 1]]
            ),
            "count every layer|count is not right",
        ),
        (lesson02.count, lambda shapes, rank: sum(2 * rank * max(pair) for pair in shapes), "count is not right"),
        (lesson02.count, lambda shapes, rank: sum(i * o for i, o in shapes), "full weights"),
        (lesson02.count, lambda shapes, rank: sum(rank * i * o for i, o in shapes), "multiplies the two sides"),
        (lesson02.count, lambda shapes, rank: sum(rank * i for i, o in shapes), "A only"),
        (lesson02.count, lambda shapes, rank: sum(rank * o for i, o in shapes), "B only"),
        (lesson02.count, lambda shapes, rank: sum(2 * rank * i for i, o in shapes), "square one"),
        (lesson02.count, lambda shapes, rank: right_count(set(shapes), rank), "count every layer"),
        (lesson02.count, lambda shapes, rank: right_count(shapes, 1), "for rank 1"),
        (lesson02.count, lambda shapes, rank: right_count(shapes[:1], rank), "first layer only"),
        (lesson02.count, lambda shapes, rank: right_count(shapes, rank) + 1, "for one layer first"),
        (lesson02.count, lambda shapes, rank: [right_count(shapes, rank)], "should be a number"),
        (lesson02.truncate, lambda matrix, rank: matrix.clone(), "whole matrix again"),
        (
            lesson02.truncate,
            lambda matrix, rank: right_truncate(matrix.float(), rank),
            "is in float32, and what you were given in float64",
        ),
        (lesson02.truncate, lambda matrix, rank: right_truncate(matrix, rank + 1), "was asked for"),
        (lesson02.truncate, lambda matrix, rank: right_truncate(matrix, rank - 1), "only, and 3"),
        (
            lesson02.truncate,
            lambda matrix, rank: torch.linalg.svd(matrix)[0][:, :rank] @ torch.linalg.svd(matrix)[2][:rank],
            "sizes are missing",
        ),
        (lesson02.truncate, smallest, "descending order"),
        (lesson02.truncate, turned, "transposed already"),
        (lesson02.truncate, only_first_rows, "there is a closer matrix"),
        (lesson02.truncate, in_place, "has changed"),
        (lesson02.truncate, lambda matrix, rank: torch.linalg.svd(matrix)[1][:rank], "has shape"),
        (lesson02.truncate, lambda matrix, rank: matrix * float("nan"), "NaN"),
        (
            lesson02.truncate,
            lambda matrix, rank: closest_by_size(matrix, torch.linalg.svdvals(matrix)[rank]),
            "stopped with IndexError",
        ),
        (lesson02.truncate, by_division, "NaN|rank is right"),
        (lesson02.truncate, lambda matrix, rank: right_truncate(matrix.double(), rank), "is in float64"),
        (lesson02.merge, merged_with(lambda alpha, rank: alpha / 4), "For use_rslora|is alpha / r"),
        (lesson02.merge, lambda w, A, B, alpha, rs: right_merge(w, A, B, alpha, False), "is alpha / sqrt"),
        (lesson02.merge, lambda w, A, B, alpha, rs: right_merge(w, A, B, 9, rs), "You have used"),
        (lesson02.merge, lambda w, A, B, alpha, rs: w.clone(), "as it was"),
        (lesson02.merge, lambda w, A, B, alpha, rs: right_merge(w, A, B, alpha, rs) - w, "the change alone"),
        (lesson02.merge, lambda w, A, B, alpha, rs: w + (right_merge(w, A, B, alpha, rs) - w).T, "lies the wrong way"),
        (
            lesson02.merge,
            lambda w, A, B, alpha, rs: w + alpha / len(A) * (B @ A if w.shape[0] == w.shape[1] else (B @ A).T),
            "lies the wrong way",
        ),
        (lesson02.merge, merged_with(lambda alpha, rank: alpha), "You have used alpha itself"),
        (lesson02.merge, merged_with(lambda alpha, rank: 1), "You have used no scaling"),
        (
            lesson02.merge,
            merged_with(lambda alpha, rank: alpha / rank),
            "With use_rslora=True the scaling is alpha / sqrt",
        ),
        (
            lesson02.merge,
            merged_with(lambda alpha, rank: alpha / rank**0.5),
            "With use_rslora=False the scaling is alpha / r,",
        ),
        (lesson02.merge, merged_with(lambda alpha, rank: (alpha / rank) ** 0.5), "the root of alpha / r"),
        (lesson02.merge, merged_with(lambda alpha, rank: alpha // rank), "alpha // r, a whole number"),
        (lesson02.merge, merged_with(lambda alpha, rank: 0.3), "a scaling of 0.3"),
        (lesson02.merge, merged_with(lambda alpha, rank: -alpha / rank), "taken away"),
        (
            lesson02.merge,
            lambda w, A, B, alpha, rs: w + alpha / (A.shape[1] ** 0.5 if rs else A.shape[1]) * (B @ A).T,
            "inputs for the rank",
        ),
        (
            lesson02.merge,
            lambda *given: right_merge(*given).T if len(given[0]) == len(given[0].T) else right_merge(*given),
            "the whole result",
        ),
        (
            lesson02.merge,
            lambda w, A, B, alpha, rs: right_merge(w.float(), A.float(), B.float(), alpha, rs),
            "Keep the dtype",
        ),
        (lesson02.merge, lambda w, A, B, alpha, rs: right_merge(w, A.flip(0), B, alpha, rs), "not what PEFT gives"),
        (lesson02.merge, merged_in_place, "Return a new one"),
    ],
)
def test_typical_mistakes_get_their_own_hint(check, wrong, hint):
    outcome = check.outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert re.search(hint, outcome.hint), outcome.hint


def test_the_reference_of_merge_changes_the_weight():
    weight, A, B, merged = lesson02.conv1d_example(5, 7, 2, 6, False, seed=1)
    assert merged.shape == weight.shape == (5, 7) and (merged - weight).abs().max() > 0.1
    assert torch.allclose(merged - weight, 3 * (B @ A).T)


def gradients(layer, A, B, x):
    x = x.clone().requires_grad_()
    output = layer(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, A, B])]


@pytest.mark.parametrize("wrong_scaling", [False, True])
def test_the_lessons_layer_is_pefts_and_a_wrong_scaling_shows(wrong_scaling):
    from collections import OrderedDict
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = nn.Linear(23, 31, dtype=torch.float64)
    config = LoraConfig(r=5, lora_alpha=7, target_modules=["proj"])
    theirs = get_peft_model(nn.Sequential(OrderedDict(proj=deepcopy(base))), config).base_model.model.proj
    ours = LoRALinear(base, 5, 7)
    assert torch.equal(ours(torch.ones(23, dtype=torch.float64)), base(torch.ones(23, dtype=torch.float64)))
    nn.init.normal_(ours.lora_B)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    A.data.copy_(ours.lora_A)
    B.data.copy_(ours.lora_B)
    if wrong_scaling:
        ours.scaling = 7
    x = torch.randn(4, 23, dtype=torch.float64)
    pairs = zip(gradients(ours, ours.lora_A, ours.lora_B, x), gradients(theirs, A, B, x), strict=True)
    agree = [bool((a - b).abs().max() < 1e-10) for a, b in pairs]
    assert agree == [not wrong_scaling] * 4


# What the lesson takes from elsewhere


def test_the_sailors_sentence_is_right():
    from pretraining.tasks import sailor_speech

    prompt, right = (re.search(rf'^{name} = "(.+)"$', SOURCE, flags=re.MULTILINE)[1] for name in ("prompt", "right"))
    assert right == sailor_speech(prompt.removeprefix("Say it like a sailor: "))


def test_frozen_norms_and_a_frozen_head_keep_less_for_the_backward_pass():
    """Of a model with trained norms and a trained output layer autograd keeps more: their inputs."""
    source = next(cell.source for cell in LESSON.cells if "def loss_and_kept" in cell.source)
    names = {"torch": torch}
    exec(compile(source, "loss_and_kept", "exec"), names)
    ids = torch.arange(12).reshape(2, 6)
    kept = {}
    for trained in ("", "norm", "lm_head"):
        model = lesson02.tiny_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("proj" in name or (bool(trained) and trained in name))
        kept[trained] = names["loss_and_kept"](model, {"input_ids": ids, "labels": ids})[1]
    assert kept[""] < kept["norm"] and kept[""] < kept["lm_head"]


@pytest.mark.parametrize("width, layers", [(1024, 24), (1280, 36)])
def test_lora_on_gpt2s_c_attn_costs_as_much_as_on_query_and_value(width, layers):
    from peft import LoraConfig
    from transformers import GPT2Config

    config = GPT2Config(n_embd=width, n_layer=layers, n_head=16 if width == 1024 else 20)
    counts = [
        counting.count_lora_parameters(config, LoraConfig(r=r, target_modules=["c_attn"])).trainable for r in (1, 4)
    ]
    q_and_v = 2 * layers * (width + width)  # for rank 1
    assert counts == [q_and_v, 4 * q_and_v]


def test_pefts_silence_and_refusals():
    """Only a list without any right name is refused; rank 0 is, and a rank above the layer's size is not."""
    import warnings

    from peft import LoraConfig, get_peft_model

    def said(**settings):
        with warnings.catch_warnings(record=True, action="always") as caught:
            get_peft_model(lesson02.tiny_model(), LoraConfig(lora_alpha=8, **settings))
        return [str(warning.message) for warning in caught if "is_gradient_checkpointing" not in str(warning.message)]

    assert said(target_modules=["q_proj", "c_attn"]) == []
    assert said(target_modules=["q_proj"], r=1000) == []
    assert "did not match any targeted module" in said(target_modules=["q_proj"], rank_pattern={"value": 2})[0]
    with pytest.raises(ValueError, match="not found in the base model"):
        said(target_modules=["c_attn"])
    with pytest.raises(ValueError, match="positive integer"):
        said(target_modules=["q_proj"], r=0)
