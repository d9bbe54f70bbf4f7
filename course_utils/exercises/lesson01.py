"""Checks of lesson 1: weigh an adapter, borrow one, find the silent ones."""

from course_utils.exercises import TryAgain, call_learner, exercise, expect_list, expect_number, expect_tensor, using


def tiny_adapted_model(names, silent=(), seed=0):
    """A random two-layer Llama with LoRA adapters of those names; the `silent` ones have only zeros in B.

    Every other adapter has a random B, but for one of its layers, where B is zero as it may be in training.
    The first of `names` is active.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=32,
            )
        )
        model = None
        for name in names:
            config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
            if model is None:
                model = get_peft_model(base, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        for adapter in set(names) - set(silent):
            for layer, B in _matrices_B(model, adapter).items():
                if "layers.0.self_attn.v_proj" not in layer:
                    torch.nn.init.normal_(B)
        model.set_adapter(names[0])
    return model.eval()


def _matrices_B(model, adapter):
    """{layer: B} of one adapter."""
    parts = (name.split(".lora_B.") for name, _ in model.named_parameters() if f".lora_B.{adapter}." in name)
    return {layer: model.get_submodule(f"{layer}.lora_B.{adapter}").weight for layer, _ in parts}


@exercise("01.weigh", title="Weigh an adapter", level="warm-up", minutes=5)
def weigh(function):
    """Compare with the product of the shapes, on random shapes; A and B come in either order, a layer may be thinner than r."""
    import random

    import torch

    rng = random.Random(5)
    for trial in range(6):
        rank, tensors, numbers = rng.choice([2, 3, 5, 7]), {}, 0
        sides = [(rng.randint(8, 30), rng.randint(31, 60)) for _ in range(rng.randint(2, 4))]
        sides.insert(rng.randrange(len(sides)), sides[-1])  # two layers of one shape
        if trial > 2:
            sides.insert(rng.randrange(len(sides)), rng.choice([(30, 1), (1, 30)]))
        for layer, (inputs, outputs) in enumerate(sides):
            name = f"base_model.model.model.layers.{layer}.mlp.up_proj"
            pair = {
                f"{name}.lora_A.weight": torch.zeros(rank, inputs),
                f"{name}.lora_B.weight": torch.zeros(outputs, rank),
            }
            tensors |= pair if trial % 2 else dict(reversed(pair.items()))
            numbers += rank * (inputs + outputs)
        answer = expect_list(call_learner(function, dict(tensors)), "the answer")
        if len(answer) != 2:
            raise TryAgain(f"Return two things, the count and the rank; you returned {len(answer)}.")
        found, found_rank = expect_number(answer[0], "the count"), expect_number(answer[1], "the rank")
        sizes = {part: sum(t.numel() for name, t in tensors.items() if part in name) for part in ("lora_A", "lora_B")}
        if (found, found_rank) == (rank, numbers):
            raise TryAgain("The two are swapped: first the count, then the rank.")
        if found == len(tensors):
            raise TryAgain("That is the number of tensors. Count the numbers inside them: tensor.numel().")
        if found in sizes.values():
            raise TryAgain("That is one of the two strips only. A and B are both stored.")
        if found == 4 * numbers:
            raise TryAgain("That is the size in bytes. Count the numbers: tensor.numel().")
        if found != numbers:
            raise TryAgain("The count is not right. Add up numel() of every tensor.")
        if found_rank != rank:
            raise TryAgain(
                "That is a side of the layer, not the rank. lora_A has the shape (rank, inputs)."
                if found_rank in {side for pair in sides for side in pair}
                else "The rank is not right. It is the side that lora_A and lora_B share."
            )


@exercise("01.borrow", title="Borrow an adapter", level="core", minutes=10)
def borrow(function):
    """Compare with PEFT's own logits under each adapter; look at what is active afterwards, also after an error.

    Which adapter was active, which is asked for, and the shape of the input change.
    """
    import torch

    names = ["first", "second", "third"]
    for seed, (was, name, shape) in enumerate((("first", "second", (1, 5)), ("third", "first", (2, 3)), ("second", "third", (1, 7)),
                                               ("second", "second", (3, 2)))):  # fmt: skip
        model, input_ids = tiny_adapted_model(names, seed=seed), torch.arange(shape[0] * shape[1]).reshape(shape)
        with torch.no_grad():
            _check_borrowed(function, model, was, name, input_ids)


def _check_borrowed(function, model, was, name, input_ids):
    import torch

    with model.disable_adapter():
        base = model(input_ids=input_ids).logits
    reference = {}
    for adapter in (name, was):  # which leaves `was` active
        model.set_adapter(adapter)
        reference[adapter] = model(input_ids=input_ids).logits
    try:
        answer = call_learner(function, model, name, input_ids)
    except TryAgain as wrong:
        if "unhashable" not in str(wrong):
            raise
        raise TryAgain(
            f"{wrong}. model.active_adapters is a list, and set_adapter takes one name: keep model.active_adapter."
        ) from None
    logits = expect_tensor(answer, base.shape, "the logits").to(base)
    if torch.equal(logits, base):
        raise TryAgain(
            "These are the base model's logits. disable_adapter() switches every adapter off; use set_adapter."
        )
    if was != name and torch.equal(logits, reference[was]):
        raise TryAgain(
            "These are the logits of the adapter that was active already. Switch to the one that is asked for."
        )
    if not torch.allclose(logits, reference[name], atol=1e-6):
        raise TryAgain("These are not the logits of the adapter that was asked for.")
    with using("the model that you were given"):
        active, logits = model.active_adapters, model(input_ids=input_ids).logits
    if active != [was]:
        raise TryAgain(
            f"The model was left with {active} active, and it had {[was]}. Keep model.active_adapter before you switch, and put that back."
        )
    if not torch.equal(logits, reference[was]):
        raise TryAgain(
            "The right adapter is active again, but the model no longer gives what it gave before. Is it disabled?"
        )
    try:
        call_learner(function, model, name, torch.tensor([[10**6]]))  # no such token, so the forward pass fails
    except TryAgain:
        pass
    else:
        raise TryAgain("The forward pass failed, and your function hid it. Let the error through: finally, not except.")
    if model.active_adapters != [was]:
        raise TryAgain(
            "When the forward pass fails, the model stays switched. Put the old adapter back in a finally block."
        )


@exercise("01.silent", title="Find the silent ones", level="stretch", minutes=15)
def silent(function):
    """Compare with what was planted: none, one, all but one. In one of the others a single number of a single B is not 0."""
    import torch

    names = ["alpha", "beta", "beta2"]  # one name is the beginning of another
    planted = ([], ["beta"], ["beta2", "alpha"], ["alpha"], ["beta2"], ["beta", "beta2"], names)
    for trial, silent_ones in enumerate(planted):
        model = tiny_adapted_model(names, silent_ones, seed=trial)
        others = [name for name in names if name not in silent_ones]
        for name in others:  # columns that cancel out: a sum of zero is not a matrix of zeros
            for B in _matrices_B(model, name).values():
                B.data = torch.cat([B.data[:, :2], -B.data[:, :2]], dim=1)
        barely = others[trial % len(others)] if trial and others else None
        if barely:
            matrices = list(_matrices_B(model, barely).values())
            for B in matrices:
                B.data.zero_()
            # Another layer and another place in it each time, and too small for a threshold.
            matrices[(trial - 1) % len(matrices)].data.flatten()[5 * trial] = 1e-12
        model.set_adapter(names[trial % 3])
        answer = expect_list(call_learner(function, model), "the answer", in_order=False)
        if not all(isinstance(name, str) for name in answer):
            raise TryAgain("Return the adapters' names, as text.")
        found, right = sorted(answer), sorted(silent_ones)
        if found == right:
            continue
        if any(name not in names for name in found):
            raise TryAgain(
                f"{next(n for n in found if n not in names)!r} is no adapter's name. It is the part after lora_B."
            )
        if len(set(found)) < len(found):
            raise TryAgain("A name stands in your answer more than once. Collect the names in a dict or a set.")
        if not found:
            raise TryAgain(
                f"{', '.join(right)}: silent, but you found none. Is it B that you look at (A is never zero), and each adapter by its whole name?"
            )
        if set(found) - set(right) == {barely}:
            raise TryAgain(
                f"You report {barely}. In one of its B, in one place, stands 1e-12, and that is not zero. Look at every B of an adapter, "
                "the first and the last, and compare with 0 itself: no mean, and no threshold."
            )
        if set(found) > set(right):
            raise TryAgain(
                "You also report an adapter with a B that is not zero. Every B must be zero, in every entry: "
                "one zero B among others is not enough, nor entries that add up to zero."
            )
        raise TryAgain("One that is silent is missing. Do you look at all adapters, also those that are not active?")
