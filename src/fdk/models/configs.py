"""Random-weight Llamas of the source project's sizes, and a tiny one that decodes in seconds on a CPU."""

from __future__ import annotations

from fdk.models.llama import LlamaConfig


def _custom(dim: int, layers: int, heads: int, ffn: int, vocab: int = 128256) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=dim // heads,
        rope_theta=500000.0,
    )


CUSTOM = {
    "custom-llama-tiny": _custom(1024, 4, 16, 2816, vocab=8192),
    "custom-llama-4B": _custom(3072, 24, 24, 11264),
    "custom-llama-12B": _custom(4096, 48, 32, 14336),
    "custom-llama-31B": _custom(6144, 60, 48, 21504),
}
