"""What several test files call."""

import dataclasses


def set_constants(monkeypatch, sizes):
    """Set {module: {constant: value}} for the test."""
    for module, constants in sizes.items():
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)


def short_answers(monkeypatch, tokens=2):
    """Let a model answer any task with so few tokens: it has learned nothing that it could say."""
    from course_utils.tasks import TASKS

    for task in list(TASKS.values()):
        monkeypatch.setitem(TASKS, task.name, dataclasses.replace(task, max_new_tokens=tokens))


def two_adapters(**settings):
    """A tiny Llama in float64 with two random adapters of rank 4, `one` and `two`; alpha is not r, so that a wrong scaling shows."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tiny_models import make_tiny_model, make_tiny_tokenizer

    model = make_tiny_model(make_tiny_tokenizer()).double()
    first, second = (LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"], **settings) for alpha in (12, 6))
    model = get_peft_model(model, first, adapter_name="one", autocast_adapter_dtype=False)
    model.add_adapter("two", second, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model
