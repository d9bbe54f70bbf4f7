"""Checks of lesson 1: weigh an adapter, borrow one, mend a folder. And the folder with the fault that the lesson looks for."""

from course_utils.exercises import (
    TryAgain,
    call_learner,
    exercise,
    expect_list,
    expect_number,
    expect_tensor,
    expect_type,
    using,
)


def tiny_adapted_model(names, seed=0):
    """A random two-layer Llama with LoRA adapters of those names, each with a random B. The first of `names` is active."""
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
                torch.nn.init.normal_(parameter)
        model.set_adapter(names[0])
    return model.eval()


def write_folder(folder, base, adapter):
    """Write the folder of lesson 1's diagnosis: the adapter at the path `adapter`, beside another one, saved with the whole of `base`.

    folder: where to; base: a fresh base model. The tensors are named as in the state dict of a PEFT model.
    """
    from peft import PeftConfig, PeftModel
    from safetensors.torch import save_file

    from adapter_checks.saving import saving
    from course_utils import paths

    model = PeftModel.from_pretrained(base, adapter, adapter_name="sailor")
    model.load_adapter(paths.adapter_path("mood"), adapter_name="mood")
    # Tied weights share memory, which safetensors refuses: the head is the embedding.
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if "lm_head" not in name}
    with saving(folder) as new:
        PeftConfig.from_pretrained(adapter).save_pretrained(new)
        save_file(state, new / "adapter_model.safetensors")


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


@exercise("01.mend", title="Mend the folder", level="core", minutes=10)
def mend(function):
    """Compare with what PEFT saves; one adapter's name begins another's, or is a word of every tensor's name."""
    import torch
    from peft import get_peft_model_state_dict

    cases = (
        (["sailor", "mood"], "sailor"),
        (["mood", "sailor"], "sailor"),
        (["beta", "beta2"], "beta"),
        (["beta2", "beta"], "beta2"),
        (["other", "model"], "model"),
        (["default"], "default"),
        (["other", "q_proj"], "q_proj"),
    )
    for seed, (names, adapter) in enumerate(cases):
        model = tiny_adapted_model(names, seed=seed)
        given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        right = {
            name: tensor.clone() for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items()
        }
        case = f"From a model with the adapters {', '.join(names)}, for {adapter}:"
        answer = expect_type(call_learner(function, dict(given), adapter), dict, "the answer")
        if not all(isinstance(name, str) for name in answer):
            raise TryAgain("The keys of your dict should be the tensors' names, as text.")
        _check_names(set(answer), set(right), set(given), case, names, adapter)
        for name, tensor in right.items():
            found = expect_tensor(answer[name], tensor.shape, name)
            if found.dtype != tensor.dtype or not torch.equal(found, tensor):
                raise TryAgain(
                    f"{case} {name} holds other numbers than the adapter's. Keep each tensor as it is; is it this adapter's?"
                )


def _check_names(found, right, given, case, names, adapter):
    """Raise `TryAgain` with what is wrong with the names of the tensors."""
    if not found:
        raise TryAgain(f"{case} nothing came back. The names to look for end like .lora_A.{adapter}.weight.")
    wrong = sorted(found - right)
    base = next((name for name in wrong if name in given and not {"lora_A", "lora_B"} & set(name.split("."))), None)
    if base:
        raise TryAgain(f"{case} {base} is a weight of the base model. Only the adapter's A and B belong into its file.")
    still = next((name for name in wrong if name.endswith(f".{adapter}.weight")), None)
    if still:
        raise TryAgain(f"{case} {still} still has the adapter's name in it. PEFT puts that in when it loads.")
    other = next((name for name in wrong for one in names if one != adapter and f".{one}." in name), None)
    if other:
        raise TryAgain(f"{case} {other} belongs to another adapter. Compare the whole name between the dots.")
    if wrong and not any(name.endswith(".weight") for name in wrong):
        raise TryAgain(f"{case} {wrong[0]} has lost its end. Only the adapter's name goes: ….lora_A.weight remains.")
    if wrong:
        raise TryAgain(
            f"{case} {wrong[0]} is no name that PEFT expects; {min(right)} is one. Take out the adapter's name behind lora_A or "
            "lora_B, and nothing else."
        )
    missing = sorted(right - found)
    if missing:
        raise TryAgain(
            f"{case} {missing[0]} and {len(missing) - 1} more are missing. A and B of every layer belong into the file."
        )
