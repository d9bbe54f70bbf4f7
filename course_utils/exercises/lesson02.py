"""Checks of lesson 2: put LoRA into a model, find what an optimizer misses."""

from course_utils.exercises import TryAgain, call_learner, describe, exercise, expect_list, expect_number, using


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


@exercise("02.optimizer", title="Find what the optimizer misses", level="core", minutes=10)
def optimizer(function):
    """Optimizers that hold all, none or some of what is trained, in one group or several, with and without frozen parameters."""
    for model, made, missed in _optimizers():
        before = [parameter.requires_grad for parameter in model.parameters()]
        in_first_group = {id(parameter) for parameter in made.param_groups[0]["params"]}
        found = expect_list(call_learner(function, model, made), "the result", in_order=False)
        if before != [parameter.requires_grad for parameter in model.parameters()]:
            raise TryAgain("requires_grad of the model's parameters has changed. Only read it.")
        others = [name for name in found if not isinstance(name, str)]
        if others:
            raise TryAgain(
                f"Return names, as model.named_parameters() gives them; one of yours is {describe(others[0])}."
            )
        parameters = dict(model.named_parameters())
        unknown = sorted(set(found) - set(parameters))
        if unknown:
            raise TryAgain(
                f"No parameter of the model is called {unknown[0]}. Return the whole names of model.named_parameters()."
            )
        frozen = sorted(name for name in found if not parameters[name].requires_grad)
        if frozen:
            raise TryAgain(f"{frozen[0]} is frozen, so no optimizer needs to hold it. Look at requires_grad.")
        if sorted(set(found)) != sorted(missed):
            raise TryAgain(_explain_missed(set(found), missed, in_first_group, parameters))
        if len(found) != len(missed):
            raise TryAgain(
                f"{len(missed)} parameters are missed, and your list has {len(found)} entries: name each once."
            )


def _optimizers():
    """(model, optimizer, names of the trained parameters that it misses), from the simplest case to the hardest."""
    import torch
    from peft import LoraConfig, get_peft_model

    def adapted(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(tiny_model(seed), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))

    def trained(model):
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    base = tiny_model()
    too_early = torch.optim.AdamW(base.parameters(), lr=0.1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    yield model, too_early, list(trained(model))
    model = adapted(1)
    yield model, torch.optim.AdamW(model.parameters(), lr=0.1), []
    model = adapted(2)
    found = trained(model)
    yield (
        model,
        torch.optim.SGD([p for name, p in found.items() if ".lora_A." in name], lr=0.1),
        [n for n in found if ".lora_B." in n],
    )
    # All in two groups, but one matrix, whose numbers are also those of another that is held.
    model = adapted(3)
    found = trained(model)
    names = list(found)
    groups = [{"params": [found[name] for name in part]} for part in (names[:3], names[3:-1])]
    yield model, torch.optim.SGD(groups, lr=0.1), names[-1:]


def _explain_missed(found, missed, in_first_group, parameters):
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    if len(missed) == 0:
        return (
            f"This optimizer holds all that is trained, and {sorted(found)[0]} is in your list. Compare parameters with "
            "those in optimizer.param_groups; optimizer.state is empty until the first step."
        )
    if found == trained - set(missed):
        return "These are the parameters that the optimizer holds. The others are asked for."
    if found == {name for name in trained if id(parameters[name]) not in in_first_group}:
        return "Only the first of the optimizer's groups was looked at. Go through all of optimizer.param_groups."
    lacking = sorted(set(missed) - found)
    if lacking:
        return (
            f"{lacking[0]} is trained and the optimizer doesn't hold it, but it is not in your list. Compare objects, by "
            "id(parameter): two parameters may hold the same numbers, or have the same shape."
        )
    return f"{sorted(found - set(missed))[0]} is in your list, and the optimizer does hold it."
