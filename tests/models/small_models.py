"""Sizes of the small random models of many tests, and such models of transformers' own classes."""

from __future__ import annotations

import torch

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def of_transformers(family: str = "Llama", head: str = "ForCausalLM", sharp: bool = False, **settings):
    """A model of SIZES in float32, the same each time; `settings` of its config come on top.

    sharp: weights larger than the initial ones, so that attention is far from uniform and every position matters.
    """
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    model = getattr(transformers, f"{family}{head}")(config).eval()
    if sharp:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model
