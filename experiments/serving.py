"""What does it cost to serve k adapters on one base: a step of 16 rows, one token each, in five ways, and the memory?

The tenants' adapters are the shipped ones, again and again under other names: what they answer plays no part. Times are
the processor's time of one thread, the median of nine, in milliseconds.
"""

import statistics
import time

from course_utils import paths, runtime

ROWS = 16
ADAPTERS = (1, 2, 4, 8, 16)
SHIPPED = ("reading", "sailor", "extract", "mood")
RUNS = [{"seed": seed, "adapters": adapters} for seed in (0, 1, 2) for adapters in ADAPTERS]


def milliseconds(action, times=9):
    """Median of the processor's time that `action` takes, after one call that is not counted."""
    taken = []
    for _ in range(times + 1):
        began = time.process_time()
        action()
        taken.append(1e3 * (time.process_time() - began))
    return statistics.median(taken[1:])


def measure(seed, adapters):
    """Times of a step in each way, and the bytes of the weights that the way holds."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from course_utils import serving
    from course_utils.exercises import lesson11

    def load():
        return AutoModelForCausalLM.from_pretrained(paths.base_model(), dtype=torch.float32).eval()

    def bytes_of(*models):
        held = {weight.data_ptr(): weight.nbytes for model in models for weight in model.parameters()}
        return sum(held.values())

    torch.set_num_threads(1)
    runtime.seed_everything(seed)
    names = [f"tenant {number}" for number in range(adapters)]
    folders = [paths.adapter_path(SHIPPED[number % len(SHIPPED)]) for number in range(adapters)]
    base, merged = load(), [PeftModel.from_pretrained(load(), folder).merge_and_unload() for folder in folders]
    model = PeftModel.from_pretrained(load(), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:]):
        model.load_adapter(folder, adapter_name=name)
    model.eval()
    tokens = torch.randint(10, base.config.vocab_size, (ROWS, 1))
    picked = torch.arange(ROWS) % adapters
    groups = [(picked == number).nonzero()[:, 0] for number in range(adapters)]
    gathered, rows = serving.with_gathered(model, names, lesson11.gathered)
    rows[0] = picked
    by_name = [names[number] for number in picked.tolist()]

    def switch():
        for name, group in zip(names, groups):
            model.base_model.set_adapter(name, inference_mode=True)
            model(tokens[group])

    with torch.no_grad():
        difference = (model(tokens, adapter_names=by_name).logits - gathered(tokens).logits).abs().max().item()
        return {
            "base_ms": milliseconds(lambda: base(tokens)),
            "peft_ms": milliseconds(lambda: model(tokens, adapter_names=by_name)),
            "gather_ms": milliseconds(lambda: gathered(tokens)),
            "merged_ms": milliseconds(lambda: [merged[k](tokens[group]) for k, group in enumerate(groups)]),
            "switch_ms": milliseconds(switch),
            "adapters_mb": bytes_of(model) / 1e6,
            "merged_mb": bytes_of(*merged) / 1e6,
            "difference": difference,
        }
