"""Check of the deep dive on four bits on a CPU: name the layers that an action has spoilt."""

from course_utils.exercises import TryAgain, call_learner, exercise, expect_list


def four_bit_layer(inputs, outputs, seed=0, quant_type="nf4", double=False):
    """A `Linear4bit` with random weights, never run; `double` quantises its scales, too."""
    import torch
    from bitsandbytes.nn import Linear4bit

    generator = torch.Generator().manual_seed(seed)
    layer = Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type=quant_type, compress_statistics=double
    )
    layer.weight.data = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    return layer.to("cpu")


def small_model():
    """Two blocks of 4-bit layers, one of them with quantised scales, and a head that is not in 4 bits."""
    from torch import nn

    parts = ("query", "key", "up", "down")
    blocks = nn.ModuleList(
        nn.ModuleDict({name: four_bit_layer(64, 64, 4 * i + j) for j, name in enumerate(parts)}) for i in range(2)
    )
    last = four_bit_layer(64, 64, 9, double=True)
    return nn.ModuleDict({"blocks": blocks, "last": last, "head": nn.Linear(64, 8)})


def spoilers(model):
    """{what happens: (an action that does it to the model, the names of the layers that it spoils)}."""
    import copy

    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    first, second = model["blocks"]

    def nothing():
        pass

    def repack():
        for layer in (first["key"], second["up"]):
            weight = layer.weight
            weight.data, weight.quant_state = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)

    def other_numbers():
        second["query"].weight.data.copy_(second["query"].weight.data.flip(0))

    def one_number():
        second["key"].weight.data[-1] ^= 1  # one step up or down in the last two numbers of the last row

    def scales_only():
        first["down"].weight.quant_state.absmax.mul_(2)

    def scales_of_scales():
        model["last"].weight.quant_state.state2.absmax.mul_(1.001)

    def another_layer():
        first["up"] = four_bit_layer(64, 64, seed=77)

    def equal_copy():
        first["query"] = copy.deepcopy(first["query"])

    def first_and_last():
        first["query"].weight.data[0] ^= 16
        model["last"].weight.data[0] ^= 16

    def head_only():
        model["head"].weight.data.zero_()

    return {
        "nothing": (nothing, set()),
        "repacking": (repack, {"blocks.0.key", "blocks.1.up"}),
        "other numbers": (other_numbers, {"blocks.1.query"}),
        "another last number": (one_number, {"blocks.1.key"}),
        "other scales": (scales_only, {"blocks.0.down"}),
        "other scales of the scales": (scales_of_scales, {"last"}),
        "another layer in the place of one": (another_layer, {"blocks.0.up"}),
        "an equal layer in the place of one": (equal_copy, set()),
        "another first number": (first_and_last, {"blocks.0.query", "last"}),
        "a head in float32": (head_only, set()),
    }


def _watched(action, ran):
    """The action as the learner gets it: it adds to `ran` when it is called, and takes nothing."""

    def watched(*given):
        if given:
            raise TryAgain(f"The action takes no arguments, and you gave it {len(given)}: call action().")
        ran.append(True)
        action()

    return watched


@exercise("deep.spoilt", title="Which weights were spoilt?", level="stretch", minutes=15)
def spoilt(function):
    """Plant damage of several kinds, in place, and compare the names that are returned."""
    from bitsandbytes.nn import Linear4bit

    for what in spoilers(small_model()):
        model, ran = small_model(), []
        action, right = spoilers(model)[what]

        answer = expect_list(call_learner(function, model, _watched(action, ran)), "the answer", in_order=False)
        if not ran:
            raise TryAgain("Your function was given an action and did not call it: action().")
        if len(ran) > 1:
            raise TryAgain("The action was called more than once. Call it once, between the two looks at the weights.")
        if not all(isinstance(name, str) for name in answer):
            raise TryAgain("Return the names of the layers, as named_modules() gives them.")
        found, layers = set(answer), {name for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
        if found == right:
            continue
        if {name.rpartition(".")[2] for name in right} == found != right:
            raise TryAgain(
                f"Two blocks may have a layer {sorted(found)[0]!r}. Give whole names, as named_modules() does: {sorted(right)[0]!r}."
            )
        if strangers := sorted(found - layers):
            raise TryAgain(
                f"{strangers[0]} is no 4-bit layer. Look at isinstance(layer, Linear4bit), and give the layer's name, not its weight's."
            )
        if what.startswith("an equal") and found:
            raise TryAgain(
                f"A layer was replaced by an equal one, and you found {sorted(found)}. Compare the numbers: torch.equal."
            )
        if what == "nothing":
            raise TryAgain(
                f"Nothing happened, and you found {sorted(found)}. Compare tensors with torch.equal, of the same layer before and after."
            )
        if "scales" in what and not found:
            raise TryAgain(
                f"The action brought {what}, and you found nothing. Its numbers alone don't tell, and there may be scales of scales: "
                "compare what dequantize_4bit gives."
            )
        if what.startswith("another layer") and not found:
            raise TryAgain(
                "A layer was replaced by another one, and you found nothing. After the action, go through the model again."
            )
        if not found:
            raise TryAgain(
                f"The action brought {what}, and you found nothing. Did you keep the weights themselves, which change with the "
                "model, rather than what dequantize_4bit gives? And compare every number."
            )
        raise TryAgain(f"The action spoilt {sorted(right)}, and you return {sorted(found)}.")
