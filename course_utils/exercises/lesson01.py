"""Checks of lesson 1: weigh an adapter, borrow one, find the silent ones."""

from course_utils.exercises import TryAgain, call_learner, exercise, expect_number, expect_tensor, expect_type, using


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
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                adapter = name.split(".lora_B.")[1].split(".")[0]
                if adapter not in silent and "layers.0.self_attn.v_proj" not in name:
                    torch.nn.init.normal_(parameter)
        model.set_adapter(names[0])
    return model.eval()


@exercise("01.weigh", title="Weigh an adapter", level="warm-up", minutes=5)
def weigh(function):
    """Compare with the product of the shapes, on random shapes; A and B come in either order."""
    import random

    import torch

    rng = random.Random(5)
    for trial in range(4):
        rank, tensors, numbers = rng.choice([2, 3, 5, 7]), {}, 0
        for layer in range(rng.randint(2, 4)):
            inputs, outputs = rng.randint(8, 30), rng.randint(31, 60)
            pair = {
                f"layers.{layer}.lora_A.weight": torch.zeros(rank, inputs),
                f"layers.{layer}.lora_B.weight": torch.zeros(outputs, rank),
            }
            tensors |= pair if trial % 2 else dict(reversed(pair.items()))
            numbers += rank * (inputs + outputs)
        answer = expect_type(call_learner(function, tensors), (tuple, list), "the answer")
        if len(answer) != 2:
            raise TryAgain(f"Return two things, the count and the rank; you returned {len(answer)}.")
        found, found_rank = expect_number(answer[0], "the count"), expect_number(answer[1], "the rank")
        sizes = {part: sum(t.numel() for name, t in tensors.items() if part in name) for part in ("lora_A", "lora_B")}
        if found == len(tensors):
            raise TryAgain("That is the number of tensors. Count the numbers inside them: tensor.numel().")
        if found in sizes.values():
            raise TryAgain("That is one of the two strips only. A and B are both stored.")
        if found != numbers:
            raise TryAgain("The count is not right. Add up numel() of every tensor.")
        if found_rank != rank:
            sides = {size for tensor in tensors.values() for size in tensor.shape}
            raise TryAgain(
                "That is a side of the layer, not the rank. lora_A has the shape (rank, inputs)."
                if found_rank in sides
                else "The rank is not right. It is the side that lora_A and lora_B share."
            )


@exercise("01.borrow", title="Borrow an adapter", level="core", minutes=10)
def borrow(function):
    """Compare with PEFT's own logits under each adapter; look at what is active afterwards, also after an error."""
    import torch

    model = tiny_adapted_model(["first", "second"])
    input_ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        with model.disable_adapter():
            base = model(input_ids=input_ids).logits
        reference = {}
        for name in ("second", "first"):
            model.set_adapter(name)
            reference[name] = model(input_ids=input_ids).logits
        logits = expect_tensor(call_learner(function, model, "second", input_ids), base.shape, "the logits").to(base)
        if torch.equal(logits, base):
            raise TryAgain(
                "These are the base model's logits. disable_adapter() switches every adapter off; use set_adapter."
            )
        if torch.equal(logits, reference["first"]):
            raise TryAgain(
                "These are the logits of the adapter that was active already. Switch to the one that is asked for."
            )
        if not torch.allclose(logits, reference["second"], atol=1e-6):
            raise TryAgain("These are not the logits of the adapter that was asked for.")
        with using("the model that you were given"):
            active, logits = model.active_adapters, model(input_ids=input_ids).logits
        if active != ["first"]:
            raise TryAgain(f"The model was left with {active} active, and it had ['first']. Put that back.")
        if not torch.equal(logits, reference["first"]):
            raise TryAgain(
                "The right adapter is active again, but the model no longer gives what it gave before. Is it disabled?"
            )
        try:
            function(model, "second", torch.tensor([[10**6]]))  # no such token, so the forward pass fails
            raise TryAgain(
                "The forward pass failed, and your function hid it. Let the error through: finally, not except."
            )
        except TryAgain:
            raise
        except Exception:
            pass
        if model.active_adapters != ["first"]:
            raise TryAgain(
                "When the forward pass fails, the model stays switched. Put the old adapter back in a finally block."
            )


@exercise("01.silent", title="Find the silent ones", level="stretch", minutes=15)
def silent(function):
    """Compare with what was planted: none, one, all but one; one zero layer does not make an adapter silent."""
    import torch

    names = ["alpha", "beta", "beta2"]  # one name is the beginning of another
    for planted in ([], ["beta"], ["beta2", "alpha"]):
        model = tiny_adapted_model(names, silent=planted)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # columns that cancel out: a sum of zero is not a matrix of zeros
                parameter.data = torch.cat([parameter.data[:, :2], -parameter.data[:, :2]], dim=1)
        answer = expect_type(call_learner(function, model), (list, tuple, set), "the answer")
        if not all(isinstance(name, str) for name in answer):
            raise TryAgain("Return the adapters' names, as text.")
        found, planted = sorted(answer), sorted(planted)
        if found == planted:
            continue
        if any(name not in names for name in found):
            raise TryAgain(
                f"{next(n for n in found if n not in names)!r} is no adapter's name. It is the part after lora_B."
            )
        if len(set(found)) < len(found):
            raise TryAgain("A name stands in your answer more than once. Collect the names in a dict or a set.")
        if not found:
            raise TryAgain(
                f"{', '.join(planted)}: silent, but you found none. Is it B that you look at (A is never zero), and each adapter by its whole name?"
            )
        if set(found) > set(planted):
            raise TryAgain(
                "You also report an adapter with a B that is not zero. Every B must be zero, in every entry: "
                "one zero B among others is not enough, nor entries that add up to zero."
            )
        raise TryAgain("One that is silent is missing. Do you look at all adapters, also those that are not active?")
