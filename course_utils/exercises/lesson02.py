"""Checks of lesson 2: put LoRA into a model, count its parameters, cut a matrix to rank r, merge into a Conv1D."""

from course_utils.exercises import TryAgain, call_learner, exercise, expect_number, expect_tensor, reference, using


def tiny_model(seed=0, bias=False):
    """A random two-layer Llama in float64, its output layer tied to nothing; with `bias` its attention has biases."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            initializer_range=0.3,
            attention_bias=bias,
        )
        return LlamaForCausalLM(config).double().eval()


@exercise("02.inject", title="Put LoRA into a model", level="core", minutes=15)
def inject(function):
    """Which layers were replaced, what is trainable, is step 0 the base, and is the change s·BA with s = alpha/r?"""
    import torch

    input_ids = torch.tensor([[3, 1, 4, 1, 5]])
    # "head" is the end of a name ("lm_head"), and no layer's name; "mlp" is the name of a block, not of a linear layer.
    # lm_head has the model itself for a parent. The last model has biases, and somebody froze it before.
    for seed, (names, expected, rank, alpha) in enumerate((
        (["v_proj"], 2, 3, 12), (["q_proj", "down_proj"], 4, 2, 5), (["head", "q", "proj"], 0, 3, 12), (["mlp", "o_proj"], 2, 3, 12),
        (["lm_head", "gate_proj"], 3, 2, 3), (["k_proj", "v_proj", "up_proj"], 6, 4, 2),
    )):  # fmt: skip
        model = tiny_model(seed, bias=seed == 5).requires_grad_(seed < 5)
        with torch.no_grad():
            before = model(input_ids=input_ids).logits
        old_layers = dict(model.named_modules())
        old_parameters = {id(parameter) for parameter in model.parameters()}
        wanted = {
            name
            for name, layer in old_layers.items()
            if isinstance(layer, torch.nn.Linear) and name.split(".")[-1] in names
        }
        try:
            found = expect_number(call_learner(function, model, names, rank, alpha), "the number of layers")
        except TryAgain as wrong:
            if "mlp" in names:
                raise TryAgain(f"{_BLOCK} {wrong}") from None
            raise
        replaced = {name for name, layer in old_layers.items() if name and _at(model, name) is not layer}
        if {name for name in replaced if name.endswith("mlp")}:
            raise TryAgain(_BLOCK)
        if replaced - wanted:
            raise TryAgain(
                f"{sorted(replaced - wanted)[0]} was replaced, and {names} was asked for. "
                "Compare the whole last part of the name: name.split('.')[-1]."
            )
        if any("." in name for name, _ in model.named_children()):
            raise TryAgain(
                "The new layer is on the model itself, under a name with dots in it, and the old one is where it was. Set it on "
                "its parent: setattr(model.get_submodule(parent_name), last_part, new_layer)."
            )
        if wanted - replaced:
            raise TryAgain(
                f"Nothing was replaced at {sorted(wanted - replaced)[0]}. Set the new layer on its parent: "
                "setattr(model.get_submodule(parent_name), last_part, new_layer)."
            )
        if found != expected:
            raise TryAgain(
                f"{expected} layers were replaced, and you returned {found:g}. Count the layers, not the names."
            )
        _check_trainable(model, old_parameters, expected)
        with torch.no_grad(), using("the model after your function"):
            after = model(input_ids=input_ids).logits
        if not torch.equal(after, before):
            raise TryAgain(
                "Before any training the output has changed. Hand the old layer over to LoRALinear, and leave B zero."
            )
        for name in wanted:
            _check_change(model.get_submodule(name), old_layers[name], rank, alpha)


_BLOCK = "mlp is the name of a block, and no linear layer. Ask each module what it is: isinstance(module, nn.Linear)."


def _at(model, name):
    """The module of this name, None if there is none any more."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _check_trainable(model, old_parameters, layers):
    lost = old_parameters - {id(parameter) for parameter in model.parameters()}
    if lost:
        raise TryAgain(f"{len(lost)} of the base's own weights are gone. Hand the old layer itself over to LoRALinear.")
    frozen = [parameter.requires_grad for parameter in model.parameters() if id(parameter) in old_parameters]
    new = [parameter.requires_grad for parameter in model.parameters() if id(parameter) not in old_parameters]
    if any(frozen):
        raise TryAgain(
            f"{sum(frozen)} of the base's own parameters are still trainable. Freeze all of them: requires_grad_(False)."
        )
    if len(new) != 2 * layers:
        raise TryAgain(
            f"{layers} layers should bring {2 * layers} new matrices, A and B for each; there are {len(new)}."
        )
    if not all(new):
        raise TryAgain("A and B are frozen, too. Freeze the model first, and put the new layers in afterwards.")


def _check_change(layer, old_layer, rank, alpha):
    """With random A and B the layer must give W x + (alpha / rank) B A x."""
    import torch

    outputs, inputs = old_layer.weight.shape
    old = {id(parameter) for parameter in old_layer.parameters()}
    new = [parameter for parameter in layer.parameters() if id(parameter) not in old]
    A = next((p for p in new if tuple(p.shape) == (rank, inputs)), None)
    B = next((p for p in new if tuple(p.shape) == (outputs, rank)), None)
    if A is None or B is None:
        raise TryAgain(
            f"For rank {rank} and a layer from {inputs} to {outputs}, A should be {(rank, inputs)} and B {(outputs, rank)}; "
            f"found {[tuple(p.shape) for p in new]}. Are rank and alpha passed on in the right order?"
        )
    with torch.no_grad():
        torch.nn.init.normal_(A)
        torch.nn.init.normal_(B)
        x = torch.randn(5, inputs, dtype=A.dtype)
        change, before = x @ A.T @ B.T, old_layer(x)
        with using("the new layer"):
            found = layer(x) - before
    if not torch.allclose(found, alpha / rank * change, atol=1e-9):
        raise TryAgain(
            "The change of a layer is not (alpha / rank)·BA. Are rank and alpha passed on in the right order?"
        )


@exercise("02.count", title="Count before you train", level="warm-up", minutes=5)
def count(function):
    """Compare with rank times (inputs + outputs), over random layers."""
    import random

    rng = random.Random(3)
    for _ in range(6):
        rank = rng.choice([2, 3, 5])
        shapes = [(rng.randint(20, 99), rng.randint(20, 99)) for _ in range(rng.randint(2, 4))]
        shapes.insert(rng.randrange(len(shapes)), shapes[-1])  # real models are all repeats
        found = expect_number(call_learner(function, list(shapes), rank), "the count")
        if found == sum(rank * (inputs + outputs) for inputs, outputs in shapes):
            continue
        mistakes = {
            sum(
                i * o for i, o in shapes
            ): "That is the count of the full weights. A and B are thin: one side of each is the rank.",
            sum(
                rank * i * o for i, o in shapes
            ): "That multiplies the two sides. A and B are two matrices: add them up.",
            sum(rank * i for i, o in shapes): "That is A only. B has the shape (outputs, rank).",
            sum(rank * o for i, o in shapes): "That is B only. A has the shape (rank, inputs).",
            sum(
                2 * rank * i for i, o in shapes
            ): "That takes every layer for a square one. A has rank × inputs numbers, B outputs × rank.",
            sum(i + o for i, o in shapes): "That is the count for rank 1. Multiply by the rank.",
            rank * sum(shapes[0]): "That is the first layer only. Add up all of them.",
            rank
            * sum(
                i + o for i, o in set(shapes)
            ): "Layers of one shape are counted once. Each has its own A and B: count every layer.",
        }
        raise TryAgain(
            mistakes.get(found, "The count is not right. Write down the shapes of A and B for one layer first.")
        )


def _expect_dtype(found, given):
    kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (found, given)]
    if kinds[0] != kinds[1]:
        raise TryAgain("The result is in {}, and what you were given in {}. Keep the dtype.".format(*kinds))


@reference
def closest(matrix, rank):
    """The matrix of this rank that is closest to `matrix`, in the same shape (Eckart and Young 1936)."""
    import torch

    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@exercise("02.truncate", title="Keep r directions", level="core", minutes=10)
def truncate(function):
    """Compare with the truncated singular value decomposition, `closest`; also at full rank, and where there is less than r to keep."""
    import torch

    generator = torch.Generator().manual_seed(4)
    for rows, columns, rank, holds, dtype in (
        (12, 12, 3, 12, torch.float64), (9, 14, 2, 9, torch.float64), (15, 8, 5, 8, torch.float64), (6, 10, 1, 6, torch.float64),
        (10, 7, 4, 7, torch.float32), (8, 11, 4, 2, torch.float64), (7, 5, 5, 5, torch.float64),
    ):  # fmt: skip
        matrix = torch.randn(rows, columns, dtype=dtype, generator=generator)
        if holds < min(rows, columns):
            matrix = closest(matrix, holds)
        given = matrix.clone()
        found = expect_tensor(call_learner(function, given, rank), (rows, columns), "the result")
        if not torch.equal(given, matrix):
            raise TryAgain("The matrix that you were given has changed. Make a new one.")
        _expect_dtype(found, matrix)
        if torch.allclose(found, closest(matrix, rank), atol=1e-8 if dtype is torch.float64 else 1e-5):
            continue
        raise TryAgain(_explain_truncated(found, matrix, rank))


def _explain_truncated(found, matrix, rank):
    import torch

    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    found_rank = int(torch.linalg.matrix_rank(found))

    def agrees(other):
        return torch.allclose(found, other, atol=1e-5)

    if agrees(matrix):
        return "This is the whole matrix again. Keep the first r singular values only."
    if agrees(U[:, :rank] @ Vh[:rank]):
        return "The directions are right, their sizes are missing: multiply with the singular values."
    if agrees(U[:, -rank:] * S[-rank:] @ Vh[-rank:]):
        return "These are the smallest directions. The singular values come in descending order: keep the first."
    if found_rank > rank:
        return f"The result has rank {found_rank}, and {rank} was asked for."
    if len(matrix) == len(matrix.T) and agrees(U[:, :rank] * S[:rank] @ Vh.T[:rank]):
        return "The right-hand factor is turned. torch.linalg.svd returns V transposed already: take its first r rows."
    if found_rank < min(rank, int(torch.linalg.matrix_rank(matrix))):
        return f"The result has rank {found_rank} only, and {rank} was asked for."
    return (
        f"The rank is right, but there is a closer matrix of rank {rank}: yours is {(found - matrix).norm():.2f} away, the "
        f"closest {S[rank:].norm():.2f}. Use torch.linalg.svd, and take U, S and Vh from one call."
    )


@exercise("02.merge", title="Merge into a layer that lies on its side", level="stretch", minutes=15)
def merge(function):
    """Compare with PEFT's own merge into a Conv1D, square and not, with and without rsLoRA."""
    import torch

    for seed, (inputs, outputs, rank, alpha, use_rslora) in enumerate(
        ((10, 10, 4, 9, False), (6, 18, 3, 8, False), (12, 9, 5, 9, True), (8, 8, 6, 7, True))
    ):
        weight, A, B, merged = conv1d_example(inputs, outputs, rank, alpha, use_rslora, seed)
        given = weight.clone()
        # The call itself can fail on shapes that a square layer hides, so a square one comes first.
        found = expect_tensor(
            call_learner(function, given, A.clone(), B.clone(), alpha, use_rslora), weight.shape, "the merged weight"
        )
        if not torch.equal(given, weight):
            raise TryAgain(
                "The weight that you were given has changed. Return a new one: weight + ..., not weight += ..."
            )
        _expect_dtype(found, weight)
        if torch.allclose(found, merged, atol=1e-10):
            continue
        change, scaling = merged - weight, alpha / (rank**0.5 if use_rslora else rank)
        if torch.allclose(found, weight, atol=1e-10):
            raise TryAgain("This is the weight as it was. Add the change.")
        if torch.allclose(found, change, atol=1e-10):
            raise TryAgain("This is the change alone. Add it to the weight.")
        if inputs == outputs and torch.allclose(found, weight + change.T, atol=1e-10):
            raise TryAgain(
                "The change lies the wrong way. A Conv1D's weight is (inputs, outputs), and BA is (outputs, inputs)."
            )
        if inputs == outputs and torch.allclose(found, merged.T, atol=1e-10):
            raise TryAgain(
                "You have turned the whole result. Turn the change alone; the weight stays (inputs, outputs)."
            )
        times = ((found - weight) * change).sum() / change.square().sum()
        if torch.allclose(found, weight + times * change, atol=1e-10):
            raise TryAgain(_other_scaling(times.item() * scaling, inputs, alpha, rank, use_rslora))
        raise TryAgain("This is not what PEFT gives. Write down the shape of each factor, and multiply B with A first.")


def _other_scaling(used, inputs, alpha, rank, use_rslora):
    """What to say when the merged weight is right but for the scaling."""
    if used < 0:
        return "The change is taken away. It is to be added."
    wanted = "alpha / sqrt(r)" if use_rslora else "alpha / r"
    mistakes = {
        "alpha itself": alpha, "no scaling": 1, "alpha / r": alpha / rank, "alpha / sqrt(r)": alpha / rank**0.5,
        "the root of alpha / r": (alpha / rank) ** 0.5, "alpha // r, a whole number": alpha // rank,
        "the number of inputs for the rank": alpha / (inputs**0.5 if use_rslora else inputs),
    }  # fmt: skip
    name = next((name for name, value in mistakes.items() if abs(value - used) < 1e-9), f"a scaling of {used:.3g}")
    return f"You have used {name}. With use_rslora={use_rslora} the scaling is {wanted}, r being the rank: A has the shape (r, inputs)."


def conv1d_example(inputs, outputs, rank, alpha, use_rslora, seed):
    """weight (inputs, outputs), A (rank, inputs), B (outputs, rank) and PEFT's merged weight, all in float64."""
    from collections import OrderedDict

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = torch.nn.Sequential(OrderedDict(proj=Conv1D(outputs, inputs).double()))
        torch.nn.init.normal_(layer.proj.weight)
        weight = layer.proj.weight.detach().clone()
        config = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=["proj"], fan_in_fan_out=True, use_rslora=use_rslora
        )
        model = get_peft_model(layer, config)
        A, B = (getattr(model.base_model.model.proj, part)["default"].weight.detach() for part in ("lora_A", "lora_B"))
        torch.nn.init.normal_(B)
        merged = model.merge_and_unload().proj.weight.detach()
    return weight, A, B, merged
