"""The base model's shape, and the optimizer that pretrains it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build_model(tokenizer, hidden=256, layers=4, intermediate=576, heads=4, context=512):
    """A Llama with random weights for this tokenizer; every linear dimension is a multiple of 64."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum whose update is made orthogonal, for the matrices of hidden layers.

    `torch.optim.Muon` orthogonalises in bfloat16, which took 9 s a step on a processor without bfloat16
    units (this one: 0.2 s, in float32). Matrices of one shape are treated together.
    """

    def __init__(self, params, lr=0.02, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """One update of every matrix."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for matrices in by_shape.values():
                updates = []
                for p in matrices:
                    velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                    velocity.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(velocity, group["momentum"]))
                rows, columns = matrices[0].shape
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                for p, update in zip(matrices, orthogonal(torch.stack(updates))):
                    p.add_(update, alpha=-scale)


def orthogonal(stack, steps=5):
    """Push the singular values of each matrix of `stack` (n, rows, columns) towards 1 by a quintic Newton-Schulz iteration."""
    transposed = stack.shape[1] > stack.shape[2]
    x = stack.mT if transposed else stack
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if transposed else x
