"""Checks of lesson 10: put a soft prompt before a batch, count what each method trains, choose a method."""

from course_utils.exercises import (
    TryAgain,
    call_learner,
    describe,
    exercise,
    expect_plain_tensor,
    expect_tensor,
    expect_whole_number,
    reference,
    using,
)

METHODS = ("a written prompt", "prompt tuning", "prefix tuning", "IA3", "layer norms", "VeRA", "LoRA")
# Letter -> the methods that do, and for others what stands against them. Every choice that is none of the METHODS is named first.
_MERGE = "Virtual tokens stand before the input: no weight can take them up, so nothing is left once PEFT is gone."
_FORM = (
    "It can be merged, but on `sailor`, whose style is new to the base, its score is far below that of LoRA of rank 8."
)
_WRAP = "It sits in the layers, and nobody may touch these. What can be given is the embeddings of the input."
_PLACES = "Its virtual tokens take places of the context, and none are free."
_CHOICES = {
    "a": (
        {"LoRA"},
        {
            "prompt tuning": _MERGE,
            "prefix tuning": _MERGE,
            "IA3": _FORM,
            "layer norms": _FORM,
            "VeRA": _FORM,
            "a written prompt": "The base does not answer in that style however it is asked: it has to learn it.",
        },
    ),
    "b": (
        {"prompt tuning"},
        {
            "prefix tuning": "A prefix is keys and values in each layer's cache. What can be given is the embeddings of the input.",
            "a written prompt": "Each customer has rows to learn from, and a prompt in words would leave them unused.",
            **dict.fromkeys(("IA3", "layer norms", "VeRA", "LoRA"), _WRAP),
        },
    ),
    "c": (
        {"layer norms"},
        {
            "prompt tuning": "20 virtual tokens of width 256 are 5,120 numbers, 20 kB, and with only 5 of them the score falls.",
            "prefix tuning": "20 virtual tokens are 40,960 numbers here: keys and values of width 256 in each of 4 layers.",
            "IA3": "It has 4,352 numbers here, 17 kB.",
            "VeRA": "Of rank 64 on queries and values it has 2,560 numbers here, 10.24 kB: just too many.",
            "LoRA": "Of rank 1 on queries and values it has 4,096 numbers here, 16 kB.",
            "a written prompt": "The base does not give such answers when it is told in words: that is what the adapters are for.",
        },
    ),
    "d": (
        {"LoRA", "IA3", "layer norms", "VeRA"},
        {
            "prompt tuning": _PLACES,
            "prefix tuning": "A prefix takes no embeddings, but its keys and values stand at positions of the context, and none are free.",
            "a written prompt": "Words take places of the context, and none are free.",
        },
    ),
    "e": (
        {"a written prompt"},
        dict.fromkeys(METHODS[1:], "It would do. But the model gives these answers already: measure what training adds before you train."),
    ),
}  # fmt: skip


@exercise("10.prepend", title="A soft prompt by hand", level="core", minutes=15)
def prepend(function):
    """What the learner gives to the base must have the logits and the loss of PEFT's model, and pass a gradient on."""
    import torch
    from peft import PromptTuningConfig, get_peft_model

    for seed, (batch, length, tokens, width) in enumerate(((3, 6, 4, 16), (2, 5, 1, 32), (1, 7, 9, 16))):
        base, generator = _tiny_llama(seed, width), torch.Generator().manual_seed(seed)
        input_ids = torch.randint(3, 48, (batch, length), generator=generator)
        mask = torch.ones_like(input_ids)
        for row in range(1, batch):
            mask[row, length - row :] = 0  # pads on the right
        labels = input_ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        model = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=tokens, task_type="CAUSAL_LM")).eval()
        soft = model.prompt_encoder["default"].embedding.weight
        expected = model(input_ids=input_ids, attention_mask=mask, labels=labels)
        prompt = soft.detach().clone().requires_grad_()
        embedding, before = base.get_input_embeddings(), base.get_input_embeddings().weight.clone()
        given = (prompt, embedding, input_ids.clone(), mask.clone(), labels.clone())
        found = _read_inputs(call_learner(function, *given), batch, length, tokens, width)
        with using("the embedding after your function"):
            if not torch.equal(embedding.weight, before):
                raise TryAgain("The embedding's weights have changed. Only the prompt is trained; the base is frozen.")
        _compare(found, expected, base, prompt, (input_ids, mask, labels), tokens)


def _tiny_llama(seed, width):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 48,
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64, initializer_range=0.3)).eval()  # fmt: skip


def _read_inputs(value, batch, length, tokens, width):
    """{name: tensor} of what the function returned, of the right shapes."""
    import torch

    if not isinstance(value, dict):
        raise TryAgain(f"Return a dict with inputs_embeds, attention_mask and labels; this is {describe(value)}.")
    with using("the dict"):
        missing = [name for name in ("inputs_embeds", "attention_mask", "labels") if name not in value]
        found = {name: value[name] for name in ("inputs_embeds", "attention_mask", "labels") if name in value}
    if missing:
        raise TryAgain(f"The dict lacks {' and '.join(missing)}.")
    long = (batch, tokens + length)
    for name in ("attention_mask", "labels"):
        if name == "attention_mask" and type(found[name]) is torch.Tensor and found[name].dtype is torch.bool:
            found[name] = found[name].long()  # a mask of True and False means the same
        tensor = expect_plain_tensor(found[name], name)
        if tuple(tensor.shape) == (batch, length):
            raise TryAgain(
                f"{name} still has the shape of the text, {(batch, length)}. Each virtual token needs its place there, too: {long}."
            )
        found[name] = expect_tensor(tensor, long, name).long()
    if getattr(found["inputs_embeds"], "shape", None) == (batch, length, width):
        raise TryAgain("inputs_embeds has the text alone. The rows of the prompt belong before it.")
    found["inputs_embeds"] = expect_tensor(found["inputs_embeds"], (*long, width), "inputs_embeds")
    return found


def _compare(found, expected, base, prompt, given, tokens):
    """Name the mistake in what was returned; `given` are the ids, mask and labels of the text."""
    import torch

    input_ids, mask, labels = given
    embeds, text = found["inputs_embeds"], base.get_input_embeddings()(input_ids)
    if not embeds.is_floating_point():
        raise TryAgain(f"inputs_embeds is {str(embeds.dtype)[6:]}. Embeddings are floating-point numbers.")
    embeds = embeds.float()
    if torch.allclose(embeds, torch.cat([text, prompt.expand(len(text), -1, -1)], 1)):
        raise TryAgain(
            "The virtual tokens stand behind the text. A model reads from left to right: put them before it."
        )
    if not torch.allclose(embeds[:, tokens:], text, atol=1e-6):
        raise TryAgain(
            "Behind the virtual tokens, the embeddings of the text should stand as they are: embedding(input_ids)."
        )
    if not torch.allclose(embeds[:, :tokens], prompt.expand(len(text), -1, -1), atol=1e-6):
        raise TryAgain("The first rows of inputs_embeds are not the prompt. Every text of the batch gets the same one.")
    if not found["attention_mask"][:, :tokens].all():
        raise TryAgain("The mask is 0 at the virtual tokens, so the model would not look at them. Put ones there.")
    if not torch.equal(found["attention_mask"][:, tokens:], mask):
        raise TryAgain("Behind the virtual tokens the mask should be the one that was given, with its pads.")
    if not (found["labels"][:, :tokens] == -100).all():
        raise TryAgain("At the virtual tokens labels are not -100: they are no words, and there is nothing to predict.")
    if not torch.equal(found["labels"][:, tokens:], labels):
        raise TryAgain(
            "Behind the virtual tokens the labels should be those that were given. The model itself shifts them by one."
        )
    output = base(inputs_embeds=embeds, attention_mask=found["attention_mask"], labels=found["labels"])
    if not torch.allclose(output.logits, expected.logits, atol=1e-4) or not torch.allclose(
        output.loss, expected.loss, atol=1e-4
    ):
        raise RuntimeError("PEFT puts a soft prompt elsewhere in this version.")
    if not embeds.requires_grad or torch.autograd.grad(output.loss, prompt, allow_unused=True)[0] is None:
        raise TryAgain(
            "The numbers are right, but no gradient reaches the prompt, so it can't be trained. Leave out detach, clone().data, "
            "torch.tensor and torch.no_grad."
        )


@exercise("10.count", title="Count what each method trains", level="core", minutes=15)
def count(function):
    """Compare with PEFT on models without weights, of sizes at which each typical mistake gives a number of its own."""
    for layers, width, feed_forward, tokens, rank in ((3, 32, 80, 7, 2), (5, 16, 24, 11, 3)):
        sizes = {"layers": layers, "width": width, "feed_forward": feed_forward, "tokens": tokens, "rank": rank}
        for method in ("prompt tuning", "prefix tuning", "IA3", "layer norms", "LoRA", "VeRA"):
            found = expect_whole_number(call_learner(function, method, *sizes.values()), f"the count for {method}")
            if found == _by_peft(method, **sizes):
                continue
            place = (
                f"For {method} with {', '.join(f'{name} {size}' for name, size in sizes.items())} this gave {found:,}. "
            )
            raise TryAgain(place + _mistakes(method, **sizes).get(found, _REMINDERS[method]))


_REMINDERS = {
    "prompt tuning": "Each virtual token is one vector of the model's width, before the first layer.",
    "prefix tuning": "Each virtual token is a key and a value, each of the model's width, in every layer.",
    "IA3": "In each layer it has a factor for each output of k_proj and of v_proj, and for each input of down_proj.",
    "layer norms": "Each layer has two norms with a number for each of the model's width, and behind the last layer there is one more.",
    "LoRA": "A is (rank, inputs), B is (outputs, rank), on q_proj and v_proj of each layer, which are square here.",
    "VeRA": "On q_proj and v_proj of each layer it trains a vector of the rank's length and one of the outputs'.",
}


def _mistakes(method, layers, width, feed_forward, tokens, rank):
    """{number: what was probably done}"""
    return {
        "prompt tuning": {
            layers * tokens * width: "A soft prompt stands before the first layer only, not in each: leave out the layers.",
            tokens: "That is how many virtual tokens there are. Each is a vector of the model's width.",
            2 * layers * tokens * width: "That is prefix tuning. A soft prompt stands before the first layer only.",
        },
        "prefix tuning": {
            tokens * width: "That is a soft prompt. A prefix stands in each layer, with a key and a value.",
            layers * tokens * width: "Each layer gets a key and a value for each virtual token: twice as many.",
            2 * tokens * width: "That is one layer's. Every layer has a prefix of its own.",
        },
        "IA3": {
            layers * 3 * width: "down_proj reads the feed-forward part's numbers, and IA3 scales what it reads: feed_forward, not width.",
            layers * 2 * width: "That is keys and values. IA3 also scales what down_proj reads.",
            2 * width + feed_forward: "That is one layer's. Every layer has its own factors.",
            layers * (width + feed_forward): "Keys and values both get factors: two times the width.",
            layers * (2 * width**2 + width * feed_forward): "These are the weights that are scaled. IA3 has one factor for a whole row or column.",
        },
        "layer norms": {
            layers * width: "Each layer has two norms, one before attention and one before the feed-forward part.",
            2 * layers * width: "The norm behind the last layer is missing: it is tuned, too.",
            (2 * layers + 1): "That is how many norms there are. Each has as many numbers as the model is wide.",
            (layers + 1) * width: "Each layer has two norms, one before attention and one before the feed-forward part.",
        },
        "LoRA": {
            2 * rank * width * 2: "That is one layer's. Every layer has its own pair for q_proj and v_proj.",
            layers * 2 * rank * width: "That is half: A and B each have rank times width numbers, and both q_proj and v_proj have them.",
            layers * 2 * width * width: "These are the weights that LoRA leaves alone. A is (rank, inputs), B is (outputs, rank).",
        },
        "VeRA": {
            layers * 4 * rank * width: "That is LoRA. VeRA's matrices are random, shared by all layers and frozen; it trains two vectors for each of q_proj and v_proj.",
            layers * 2 * width: "That is one of the two vectors. The other has the rank's length.",
            layers * 2 * rank: "That is one of the two vectors. The other has a number for each output.",
            layers * (rank + width): "q_proj and v_proj both have vectors of their own.",
            2 * (rank + width): "That is one layer's. Only the random matrices are shared by all.",
            layers * 2 * (rank + width) + 2 * rank * width: "The random matrices are frozen: they are not trained, and need not be counted.",
        },
    }[method]  # fmt: skip


@reference
def _by_peft(method, layers, width, feed_forward, tokens, rank):
    import warnings

    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": width, "intermediate_size": feed_forward, "num_hidden_layers": layers}
    task, in_layers = {"task_type": "CAUSAL_LM"}, ["q_proj", "v_proj"]
    config = {
        "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=tokens, **task),
        "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=tokens, **task),
        "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **task),
        "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"], **task),
        "LoRA": lambda: peft.LoraConfig(r=rank, target_modules=in_layers, **task),
        "VeRA": lambda: peft.VeraConfig(r=rank, target_modules=in_layers, **task),
    }[method]()  # fmt: skip
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
        return peft.get_peft_model(base, config).get_nb_trainable_parameters()[0]


@exercise("10.choose", title="Choose a method", level="core", minutes=10)
def choose(function):
    """Each of the five situations, in an order that no answer can lean on."""
    for letter in "cadbe":
        found = call_learner(function, letter)
        if not isinstance(found, str):
            raise TryAgain(f"For situation {letter}, return the name of a method as text; this is {describe(found)}.")
        name = next((method for method in METHODS if method.lower() == found.strip().lower()), None)
        if name is None:
            raise TryAgain(f"For situation {letter} this is {describe(found)}. Choose one of: {', '.join(METHODS)}.")
        right, against = _CHOICES[letter]
        if name not in right:
            raise TryAgain(f"Situation {letter}, {name}: {against[name]}")
