"""LoRA on a base in 32 and 16 bits, in int8 and in NF4: what is learned, and what is forgotten?

All runs have the same rows, steps, batches, rate, rank and seeds, a score before training and an evaluation in the middle.
TRL makes the adapter bf16 on a quantised base; here it is float32 on every base, or two things would change at once, but in
`nf4_trl`, which is NF4 with the adapter as TRL leaves it. `nf4_repacked` does by hand, on any processor, what one with
AVX512-BF16 does to a model without `stop_repacking`: see `cut_after_a_look`. The 80 steps at 1e-2 are fewer than the 120 of
other sweeps.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from adapter_checks import memory
from adapter_checks.bitsandbytes_workarounds import quiet_int8, stop_repacking
from course_utils import data, paths, runtime
from experiments import training
from experiments.learning_rate import lora_config

STEPS, RATE = 80, 1e-2
CHECKED = 100  # rows of the validation split
WEIGHTS = ("fp32", "bf16", "int8", "nf4", "nf4_double", "nf4_trl", "nf4_repacked")
RUNS = [{"seed": seed, "weights": weights} for seed in training.SEEDS for weights in WEIGHTS]


def load_base(weights):
    """(base model with its linear layers in this form, its tokenizer). Arithmetic is in float32 but for `bf16`."""
    if weights in ("fp32", "bf16"):
        settings = None
    elif weights == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=weights == "nf4_double",
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = paths.base_model()
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=settings)
    if settings is None:
        model = model.to(runtime.device())  # a quantised one is there already
    stop_repacking(model)
    if weights == "nf4_repacked":
        cut_after_a_look(model)
    return model, AutoTokenizer.from_pretrained(base)


def cut_after_a_look(model):
    """Let a 4-bit layer pass no gradient on, once it has run in eval mode on an input without gradient.

    That is what the kernel for AVX512-BF16 comes to in training. It also rounds to bfloat16, which is left out here.
    """
    from bitsandbytes.nn import Linear4bit

    looked_at = set()

    def cut(layer, inputs, output):
        if not layer.training and not inputs[0].requires_grad:
            looked_at.add(layer)
        return output.detach() if layer in looked_at else output

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.register_forward_hook(cut)


def make_trainer(seed, weights, **changes):
    """(trainer, its StepClock) of the one recipe on a base in this form."""
    quiet_int8()
    task = training.TASK
    trainer, clock = training.make_trainer(
        data.load_task(task, "train"),
        RATE,
        seed,
        lora=lora_config(),
        load=lambda: load_base(weights),
        **{"max_steps": STEPS, "logging_steps": 20, **changes},
    )
    if weights != "nf4_trl":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # the optimizer is made later, when training begins
    return trainer, clock


def measure(seed, weights):
    """Score on test rows, loss on validation rows and on held-out text, and bytes of the model's own tensors."""
    validation = data.load_task(training.TASK, "validation").select(range(CHECKED))
    trainer, _ = make_trainer(seed, weights, eval_rows=validation, eval_strategy="steps", eval_steps=STEPS // 2)
    model, tokenizer = trainer.model, trainer.processing_class
    before = training.held_out_loss(model, tokenizer)
    trainer.train()
    test = training.score(model, tokenizer, training.TASK, training.scored_rows(training.TASK, "test"))
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    return {
        "test": test["score"],
        "novel": test["novel"],
        "validation_loss": losses[-1],
        "held_out_before": before,
        "held_out_after": training.held_out_loss(model, tokenizer),
        "footprint": model.get_memory_footprint(),
        "weights_bytes": memory.measure_training_state(model).weights,
        **training.loss_curve(trainer),
    }
