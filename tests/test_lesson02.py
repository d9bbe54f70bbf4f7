"""The checks of lesson 2: the stub is to do, the solution passes, each typical mistake gets its own hint."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

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


def right_optimizer(model, optimizer):
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]


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


def optimizer_by_sets(model, optimizer):
    held = set().union(*(group["params"] for group in optimizer.param_groups))  # tensors hash by identity
    return {name for name, p in model.named_parameters() if p.requires_grad} - {
        name for name, p in model.named_parameters() if p in held
    }


def optimizer_by_is(model, optimizer):
    missed = []
    for name, parameter in reversed(list(model.named_parameters())):
        groups = (group["params"] for group in optimizer.param_groups)
        if parameter.requires_grad and not any(parameter is other for held in groups for other in held):
            missed.append(name)
    return tuple(missed)


def optimizer_by_addresses(model, optimizer):
    held = [p.data_ptr() for group in optimizer.param_groups for p in group["params"]]
    return sorted(n for n, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in held)


SOLUTIONS = {"02.inject": right_inject, "02.optimizer": right_optimizer}
RIGHT = {
    "02.inject": [inject_by_parents, inject_by_set_submodule, inject_downwards],
    "02.optimizer": [optimizer_by_sets, optimizer_by_is, optimizer_by_addresses],
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


def narrow(old, rank, alpha):
    """A layer that gives the first of its outputs only."""
    layer = LoRALinear(old, rank, alpha)
    forward = layer.forward
    layer.forward = lambda x: forward(x)[..., :1]
    return layer


def optimizer_by_numbers(model, optimizer):
    """Compares the numbers, so that two zero matrices are one."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not any(p.shape == other.shape and torch.equal(p, other) for other in held)
    ]


def optimizer_first_group(model, optimizer):
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]


def optimizer_by_state(model, optimizer):
    return [name for name, p in model.named_parameters() if p.requires_grad and p not in optimizer.state]


def optimizer_with_frozen(model, optimizer):
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in model.named_parameters() if id(p) not in held]


def optimizer_thaws(model, optimizer):
    model.requires_grad_(True)
    return right_optimizer(model, optimizer)


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
        (lesson02.optimizer, optimizer_by_numbers, "two parameters may hold the same numbers"),
        (lesson02.optimizer, optimizer_first_group, "Only the first of the optimizer's groups"),
        (lesson02.optimizer, optimizer_by_state, "optimizer.state is empty until the first step"),
        (lesson02.optimizer, optimizer_with_frozen, "is frozen, so no optimizer needs to hold it"),
        (lesson02.optimizer, optimizer_thaws, "Only read it"),
        (lesson02.optimizer, lambda model, optimizer: right_optimizer(model, optimizer)[:-1], "is not in your list"),
        (lesson02.optimizer, lambda model, optimizer: right_optimizer(model, optimizer) * 2, "name each once"),
        (lesson02.optimizer, lambda model, optimizer: len(right_optimizer(model, optimizer)), "should be of type"),
        (
            lesson02.optimizer,
            lambda model, optimizer: [p for p in model.parameters() if p.requires_grad],
            "Return names",
        ),
        (
            lesson02.optimizer,
            lambda model, optimizer: [name.rpartition(".lora_")[2] for name in right_optimizer(model, optimizer)],
            "Return the whole names",
        ),
        (
            lesson02.optimizer,
            lambda model, optimizer: [
                n
                for n, p in model.named_parameters()
                if p.requires_grad and p not in optimizer.param_groups[0]["params"]
            ],
            "Your code stopped with RuntimeError",
        ),
        (
            lesson02.optimizer,
            lambda model, optimizer: (
                [
                    n
                    for n, p in model.named_parameters()
                    if p.requires_grad and n not in right_optimizer(model, optimizer)
                ]
                or right_optimizer(model, optimizer)
            ),
            "holds. The others are asked for|in your list",
        ),
    ],
)
def test_typical_mistakes_get_their_own_hint(check, wrong, hint):
    outcome = check.outcome(wrong)
    assert outcome.status == "TRY AGAIN"
    assert re.search(hint, outcome.hint), outcome.hint


def test_a_fold_has_the_title_of_what_python_says_to_compared_tensors():
    def compares(model, optimizer):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        return [name for name, p in model.named_parameters() if p.requires_grad and p not in held]

    said = re.search(r"The size of tensor a|Boolean value of Tensor", lesson02.optimizer.outcome(compares).hint).group()
    assert said in " ".join(re.findall(r"<summary>(.*?)</summary>", SOURCE))


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


def test_an_optimizer_made_before_peft_misses_all_of_the_adapter():
    """The fault that the lesson plants: nothing warns, the gradients arrive, and nothing moves."""
    from peft import LoraConfig, get_peft_model

    base = lesson02.tiny_model()
    optimizer = torch.optim.AdamW(base.parameters(), lr=0.1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert any(p.grad.abs().max() > 0 for p in trained.values())
    assert all(torch.equal(p, before[name]) for name, p in trained.items())
    assert sorted(right_optimizer(model, optimizer)) == sorted(trained)
