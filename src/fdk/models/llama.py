"""A minimal Llama with Hugging Face's parameter names: prefill and decoding on a static cache, nothing else.

Its relatives differ in little: Mistral in a sliding window, Qwen2 in biases, Qwen3 in norms of queries and keys.
Written after transformers' LlamaForCausalLM, whose logits the tests compare. Shapes: b sequences, t tokens,
h query heads, g key/value heads, d = head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fdk.errors import FormatError, UnsupportedError

ARCHITECTURE = "LlamaForCausalLM"
RELATIVES = (ARCHITECTURE, "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Tokens of all sequences together that a prefill takes at a time: enough for the products, few enough for memory.
PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Hugging Face Llama config that change the arithmetic; `rope_scaling` as there (type llama3).

    output_bias     whether o_proj has a bias; None: as the other projections of the attention.
    qk_norm         whether queries and keys are normed, head by head, before they are turned.
    sliding_window  positions that a token sees, itself included; None: all. Caches may not be longer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 500000.0
    rope_scaling: Mapping | None = None
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    output_bias: bool | None = None
    qk_norm: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise FormatError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}; correct config.json"
            )
        if self.head_dim % 2:
            raise FormatError(
                f"head_dim = {self.head_dim} is odd, but rotary embedding pairs the channels; correct config.json"
            )

    @classmethod
    def from_hf(cls, config: Mapping, where: str = "config.json") -> LlamaConfig:
        """From the Hugging Face config of a Llama or one of its RELATIVES, whichever `architectures` names first.

        FormatError for a missing field, UnsupportedError for other arithmetic.
        """
        family = (config.get("architectures") or [ARCHITECTURE])[0]
        values = {}
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            values[name] = _positive(config, name, where)
        heads = values["num_attention_heads"]
        values["num_key_value_heads"] = _positive(config, "num_key_value_heads", where, heads)
        values["head_dim"] = _positive(config, "head_dim", where, values["hidden_size"] // heads)
        if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise UnsupportedError(
                f"{where}: hidden_act {activation!r} is not in fdk's Llama, which has silu; load with transformers"
            )
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise UnsupportedError(
                f"{where}: rope type {kind!r} is not in fdk's Llama (default, llama3); load with transformers"
            )
        values["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
        values["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} if kind == "llama3" else None
        for name, fallback in (("rms_norm_eps", 1e-6), ("max_position_embeddings", 2048)):
            values[name] = config.get(name, fallback)
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            values[name] = bool(config.get(name, False))
        if family == "Qwen2ForCausalLM":
            values |= {"attention_bias": True, "output_bias": False}
        values["qk_norm"] = family == "Qwen3ForCausalLM"
        if family != ARCHITECTURE and config.get("use_sliding_window", family == "MistralForCausalLM"):
            values["sliding_window"] = config.get("sliding_window")
        return cls(**values)

    def to_hf(self) -> dict:
        """A config.json that transformers and `from_hf` read; UnsupportedError for a relative, which has its own."""
        own = {name: getattr(self, name) for name in ("output_bias", "qk_norm", "sliding_window")}
        if any(own.values()):
            raise UnsupportedError(f"no Llama of transformers has {own}; keep the config.json of the original")
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "hidden_act": "silu",
            **{name: value for name, value in asdict(self).items() if name not in own},
            "rope_scaling": None if self.rope_scaling is None else dict(self.rope_scaling),
        }

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        d, attention = self.hidden_size, self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        layer = 2 * d * attention + 2 * d * kv + 3 * d * self.intermediate_size + 2 * d
        output_bias = self.attention_bias if self.output_bias is None else self.output_bias
        layer += self.attention_bias * (attention + 2 * kv) + output_bias * d + 2 * self.qk_norm * self.head_dim
        layer += self.mlp_bias * (2 * self.intermediate_size + d)
        return self.num_hidden_layers * layer + d + self.vocab_size * d * (1 if self.tie_word_embeddings else 2)


def _positive(config: Mapping, name: str, where: str, fallback: int | None = None) -> int:
    value = config.get(name)
    value = fallback if value is None else value
    if value is None:
        raise FormatError(f"{where} has no {name}, which a Llama needs; restore the file from the original model")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError(f"{where}: {name} = {value!r} is not a positive number; correct it")
    return value


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """float32 [d / 2] on the CPU: theta^(-2i/d), slowed down at long wavelengths for rope type llama3."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return frequency
    try:
        factor, low, high, length = (
            float(config.rope_scaling[name])
            for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
    except KeyError as error:
        raise FormatError(f"rope_scaling of type llama3 has no {error}; correct config.json") from None
    wavelength = 2 * math.pi / frequency
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * frequency / factor + smooth * frequency
    return torch.where(
        wavelength > length / low, frequency / factor, torch.where(wavelength < length / high, frequency, between)
    )


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), normalised in float32 and rounded to x's dtype before the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [b, heads, t, d]; cos, sin [t, d] or [b, 1, t, d]; channel i is paired with i + d/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Cache:
    """Keys and values of `length` positions, [layers, b, g, length, d] each, and the rotary table beside them.

    padding: how many positions at the beginning of each sequence hold no token, int64 [b]; None: none in any.
    """

    def __init__(self, config: LlamaConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.cos, self.sin = rotary_table(config, length, device, dtype)
        self.length = length
        self.filled = 0
        self.padding: Tensor | None = None

    def angles(self, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the next `count` positions, [count, d], or [b, 1, count, d] where sequences are padded."""
        end = self.filled + count
        if self.padding is None:
            return self.cos[self.filled : end], self.sin[self.filled : end]
        places = torch.arange(self.filled, end, device=self.padding.device)
        positions = (places - self.padding[:, None]).clamp(min=0)
        return self.cos[positions][:, None], self.sin[positions][:, None]

    def mask(self, count: int) -> Tensor | None:
        """Which positions the next `count` tokens see, bool [b, 1, count, filled + count]; None: all up to their own.

        A position that holds no token sees itself, because a softmax over nothing is not a number.
        """
        if self.padding is None:
            return None
        end = self.filled + count
        keys = torch.arange(end, device=self.padding.device)
        queries = keys[self.filled :, None]
        return ((keys <= queries) & (keys >= self.padding[:, None, None]) | (keys == queries))[:, None]


def left_padding(mask: Tensor) -> Tensor:
    """Padding [b] of prompts by their attention mask [b, t]: 0 for positions without a token, all before the others.

    UnsupportedError if they are elsewhere, or a prompt has no tokens.
    """
    held = mask.bool()
    padding = (~held).sum(1)
    expected = torch.arange(mask.shape[1], device=mask.device) >= padding[:, None]
    if not torch.equal(held, expected):
        raise UnsupportedError("its prompts are masked elsewhere than at their beginning")
    if (padding == mask.shape[1]).any():
        raise UnsupportedError("one of its prompts has no tokens")
    return padding


def rotary_table(config: LlamaConfig, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [length, d] of positions 0 to length - 1, computed in float32."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), inverse_frequencies(config)).repeat(
        1, 2
    )
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.index = index
        size, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(size, self.kv_heads * self.head_dim, bias=bias)
        output_bias = bias if config.output_bias is None else config.output_bias
        self.o_proj = nn.Linear(self.heads * self.head_dim, size, bias=output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.heads, self.head_dim)
        k = self.k_proj(x).view(b, t, self.kv_heads, self.head_dim)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)
        start = 0
        if cache is not None:
            start = cache.filled
            keys, values = cache.keys[self.index], cache.values[self.index]
            keys[:, :, start : start + t], values[:, :, start : start + t] = k, v
            k, v = keys[:, :, : start + t], values[:, :, : start + t]
        y = attend(q, k, v, start, mask)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, self.heads * self.head_dim))


def attention_backends(device: torch.device) -> AbstractContextManager:
    """On a GPU all but cuDNN's, which plans anew, for 2 ms a layer, whenever the number of keys grows."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def attend(q: Tensor, k: Tensor, v: Tensor, start: int, mask: Tensor | None = None) -> Tensor:
    """Causal attention of q [b, h, t, d] at positions start.. on k, v [b, g, start + t, d].

    mask: bool [b, 1, t, start + t], in place of the causal one.
    """
    b, heads, t, d = q.shape
    groups = heads // k.shape[1]
    if t == 1:
        # One query token: the heads that share keys become rows of one product, so that keys are not copied.
        y = F.scaled_dot_product_attention(q.reshape(b, k.shape[1], groups, d), k, v, attn_mask=mask)
        return y.reshape(b, heads, 1, d)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if mask is None and start == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if mask is None:
        mask = torch.ones(t, start + t, dtype=torch.bool, device=q.device).tril(start)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, config: LlamaConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Everything below the head; called `model` in the names of the parameters."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        if not embedding.is_meta:
            # On the meta device normal_ would import torch's compiler, which takes seconds.
            nn.init.normal_(embedding)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """logits [b, t, vocab] of tokens [b, t]; with a cache, the tokens follow those that it already holds."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def skeleton(cls, config: LlamaConfig) -> Llama:
        """The modules on the meta device: shapes without memory."""
        with torch.device("meta"):
            return cls(config)

    def set_precision(self, precision) -> dict[str, int]:
        """Serve nested layers at other widths; see `fdk.set_precision`."""
        from fdk.models.precision import set_precision

        return set_precision(self, precision)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` sequences of at most `length` tokens; UnsupportedError as for `check_length`."""
        self.check_length(length)
        return Cache(self.config, batch, length, self.device, self.dtype)

    def check_length(self, length: int) -> None:
        """UnsupportedError if a token may not see `length` positions, because the attention slides."""
        window = self.config.sliding_window
        if window is not None and length > window:
            raise UnsupportedError(
                f"a token sees {window} positions (sliding_window), but {length} are asked for; ask for fewer tokens, "
                "or decode by transformers' own generate"
            )

    def prefill(self, tokens: Tensor, cache: Cache, mask: Tensor | None = None) -> Tensor:
        """Fill the cache with tokens [b, t], PREFILL_TOKENS at a time; logits [b, vocab] of the last ones.

        mask: 0 for positions without a token, [b, t], as `left_padding` takes it.
        """
        cache.padding = None if mask is None else left_padding(mask)
        for part in tokens.split(max(1, PREFILL_TOKENS // max(1, tokens.shape[0])), 1):
            logits = self(part, cache, last_only=True)
        return logits[:, -1]

    def forward(self, tokens: Tensor, cache: Cache | None = None, last_only: bool = False) -> Tensor:
        start, t = (0 if cache is None else cache.filled), tokens.shape[1]
        if cache is None:
            cos, sin = rotary_table(self.config, t, self.device, self.dtype)
        elif start + t > cache.length:
            raise ValueError(
                f"the cache holds {cache.length} positions, but {start} + {t} are asked for; make a longer one"
            )
        else:
            cos, sin = cache.angles(t)
        mask = None if cache is None else cache.mask(t)
        x = self.model.embed_tokens(tokens)
        with attention_backends(self.device):
            for layer in self.model.layers:
                x = layer(x, cos, sin, cache, mask)
        if cache is not None:
            cache.filled += t
        x = self.model.norm(x[:, -1:] if last_only else x)
        return self.lm_head(x)
