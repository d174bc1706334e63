"""One decoding step of a Llama on a GPU as a CUDA graph: merged projections, chain.py and fused.py between them."""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from fdk.errors import UnsupportedError
from fdk.kernels.cuda import attend, jit
from fdk.kernels.triton import interpreted
from fdk.models.chain import Normed, Products, fuse
from fdk.models.llama import Llama, RMSNorm
from fdk.models.merge import merge_

# Programs of the attention that a long cache is spread over: two for each multiprocessor of a large GPU.
_PROGRAMS = 264
# Programs wait for their loads one block after the other, so chunks are short; many chunks take long to add up.
_CHUNKS, _MOST_SPLITS = (64, 512), 64
# Positions at once, warps, copies in flight: of a short cache, whose programs should all find a place, and of chunks.
_SHORT, _LONG = (32, 4, 2), (64, 8, 3)
_LOGITS = 2048
# Outputs, columns at once and warps of a program that multiplies one row of x by dense weights.
_DENSE_ROW = (4, 1024, 4)
# The same of 2 to 16 and of up to 64 rows, and stages of its loop, for as many outputs as a vocabulary has; torch
# multiplies others.
_DENSE_ROWS, _DENSE_ROWS_FROM = {16: (128, 128, 4, 3), 64: (64, 128, 4, 3)}, 1 << 16
PADDED = "they are padded, and the kernels of the attention read every position up to the last"


def reason_against(model: nn.Module) -> str | None:
    """Why a model cannot be decoded by `Step`; None if it can."""
    if not isinstance(model, Llama):
        return f"it is a {type(model).__name__}, not fdk's Llama"
    if find_spec("triton") is None:
        return "the triton package is not installed"
    dim = model.config.head_dim
    if dim < 32 or dim & (dim - 1):
        return f"its heads have {dim} channels, not a power of two from 32 on"
    if interpreted():
        return None
    if model.device.type != "cuda":
        return f"it lies on {model.device}, not on a CUDA device"
    if torch.cuda.get_device_capability(model.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"its dtype is {model.dtype}, not bfloat16 or float16"
    return None


def chunk_of(length: int, heads: int) -> int:
    """Cache positions that one program of the attention reads; `heads`: key/value heads of all sequences together."""
    least, most = _CHUNKS
    wanted = max(min(max(least, length * heads // _PROGRAMS), most), -(-length // _MOST_SPLITS))
    return 1 << (wanted - 1).bit_length()


class Step:
    """Greedy decoding of `batch` sequences of up to `length` tokens, one token each per call.

    The model's query, key and value projections, and its gate and up projections, become views of merged weights
    (`merge_`); nothing else about the model changes, and its own forward stays the plain path. Another `Step` of the
    same model merges anew: drop the first one before, or its copy of these weights stays in memory. UnsupportedError,
    with the reason, for a model that `reason_against` turns down.

    tokens [b, 1] int64: the tokens to feed next, which a call replaces by the most likely ones; write others into it
    to sample from `logits` [b, vocab], which are those of the last call. Both are overwritten by the next call.

    epilogues: whether norms, gates and residual sums are done by the products where `chain.pays`.
    """

    @torch.inference_mode()
    def __init__(self, model: Llama, batch: int, length: int, epilogues: bool = True) -> None:
        if reason := reason_against(model):
            raise UnsupportedError(f"Step cannot decode this model: {reason}; call the model itself")
        config = self.config = model.config
        self.model, self.batch = model, batch
        self.cache = model.new_cache(batch, length)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
        self.position = torch.zeros(1, dtype=torch.int32, device=model.device)
        # The model's weights become views of the merged ones, and autograd takes no tensor of the inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self.products = [
                Products(
                    merge_([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                    layer.self_attn.o_proj,
                    merge_([layer.mlp.gate_proj, layer.mlp.up_proj]),
                    layer.mlp.down_proj,
                )
                for layer in model.model.layers
            ]
        heads = batch * config.num_key_value_heads
        self.rows = max(16, 1 << (config.num_attention_heads // config.num_key_value_heads - 1).bit_length())
        self.chunk = chunk_of(length, heads)
        self.splits = -(-length // self.chunk)
        partial = (heads, self.splits if self.splits > 1 else 0, self.rows, config.head_dim + 2)
        self.partial = torch.empty(partial, dtype=torch.float32, device=model.device)
        self.arrived = torch.zeros(heads, dtype=torch.int32, device=model.device)
        self.on_gpu = model.device.type == "cuda"
        self.fused = [None] * len(self.products)
        if self.on_gpu and epilogues:
            self.fused = fuse(self.products, batch, config.rms_norm_eps)
        self.common = {"PDL": False, "INTERPRETED": interpreted()}
        self.attention = self._cuda_attention(heads, length) if self.on_gpu else None
        self.workspace = self.attention and self.attention.workspace(heads, model.device)
        self.graph = None
        if self.on_gpu:
            pdl = torch.cuda.get_device_capability(model.device) >= (9, 0)
            self.common |= {"PDL": pdl, "launch_pdl": pdl}
            self._capture()

    def _cuda_attention(self, heads: int, length: int) -> attend.Config | None:
        """The configuration of the CUDA kernel for the attention, which has none before Hopper; None: fused.attend."""
        capability = torch.cuda.get_device_capability(self.model.device)
        if capability < (9, 0) or jit.unavailable(capability):
            return None
        config, sms = self.config, torch.cuda.get_device_properties(self.model.device).multi_processor_count
        # With more heads than multiprocessors throughput counts, and fused.attend has the tensor cores.
        if heads > sms:
            return None
        queries = config.num_attention_heads // config.num_key_value_heads
        bf16 = self.model.dtype == torch.bfloat16
        return attend.choose_config(config.head_dim, queries, heads, length, bf16, config.qk_norm, sms)

    def _capture(self) -> None:
        """Run twice to compile everything, then record; a prefill overwrites what these put into the cache."""
        stream = torch.cuda.Stream(self.model.device)
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.device(self.model.device), torch.cuda.stream(stream):
            for _ in range(2):
                self.position.zero_()
                self._run()
            stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.graph_logits = self._run()
        torch.cuda.current_stream(self.model.device).wait_stream(stream)
        self.position.zero_()

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Start again with tokens [b, t] by the model's own forward; the most likely next tokens [b, 1].

        UnsupportedError for a mask: every sequence begins at the first position.
        """
        if mask is not None:
            raise UnsupportedError(f"Step cannot decode these prompts: {PADDED}; use PlainStep")
        self.cache.filled = 0
        self.logits = self.model.prefill(tokens, self.cache)
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))
        self.position.fill_(self.cache.filled)
        return self.tokens

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Feed `tokens`, which then hold the most likely next ones [b, 1]."""
        if self.cache.filled >= self.cache.length:
            raise ValueError(f"the cache holds {self.cache.length} positions, and all are taken; make a longer one")
        if self.graph is None:
            self.logits = self._run()
        else:
            self.graph.replay()
            self.logits = self.graph_logits
        self.cache.filled += 1
        return self.tokens

    def _run(self) -> Tensor:
        """Feed `tokens`; the logits, whose most likely tokens they then are."""
        body = self.model.model
        embedding = body.embed_tokens.weight
        x = embedding.new_empty(self.batch, embedding.shape[1])
        normed = self._norm(x, embedding, body.layers[0].input_layernorm, embed=True)
        next_norms = [*(layer.input_layernorm for layer in body.layers[1:]), body.norm]
        for index, (layer, next_norm) in enumerate(zip(body.layers, next_norms, strict=True)):
            products, fused = self.products[index], self.fused[index]
            last = next_norm is body.norm
            if fused is None:
                attended = self._attend(self._multiply(products.qkv, normed.values), index)
                normed = self._norm(x, self._multiply(products.o, attended), layer.post_attention_layernorm)
                inner = self._gate(self._multiply(products.gate_up, normed.values))
            else:
                attended = self._attend(fused.qkv(normed), index)
                normed = fused.o.add_to(x, attended, layer.post_attention_layernorm.weight)
                inner = fused.gate_up(normed)
            if fused is not None and fused.adds:
                normed = fused.down.add_to(x, inner, next_norm.weight)
            else:
                out = self._multiply(products.down, inner) if fused is None else fused.down(Normed(inner))
                normed = self._norm(x, out, next_norm, count=last)
        logits = self._multiply(self.model.lm_head, normed.values)
        self._choose(logits)
        return logits

    def _multiply(self, layer: nn.Module, x: Tensor) -> Tensor:
        """layer(x); one row by dense weights in this chain of launches: weights are on their way before x is."""
        dependent = self.common["PDL"] or self.common["INTERPRETED"]
        dense = type(layer) is nn.Linear and layer.weight.is_contiguous() and layer.in_features % 8 == 0
        most = max(_DENSE_ROWS) if dense and layer.out_features >= _DENSE_ROWS_FROM else 1
        if not dense or not dependent or self.batch > most:
            return layer(x)
        if self.batch > 1:
            return self._multiply_rows(layer, x)
        from fdk.models.fused import multiply_row

        (n, k), (rows, block, warps) = layer.weight.shape, _DENSE_ROW
        out, bias = x.new_empty(1, n), layer.bias
        multiply_row[(-(-n // rows),)](
            x,
            layer.weight,
            x if bias is None else bias,
            out,
            n,
            K=k,
            BIAS=bias is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
            **self.common,
        )
        return out

    def _multiply_rows(self, layer: nn.Linear, x: Tensor) -> Tensor:
        from fdk.models.fused import multiply_rows

        (n, k), most = layer.weight.shape, next(most for most in sorted(_DENSE_ROWS) if self.batch <= most)
        rows, block, warps, stages = _DENSE_ROWS[most]
        out, bias = x.new_empty(self.batch, n), layer.bias
        multiply_rows[(-(-n // rows),)](
            x,
            layer.weight,
            x if bias is None else bias,
            out,
            self.batch,
            n,
            K=k,
            BIAS=bias is not None,
            TOKENS=max(16, 1 << (self.batch - 1).bit_length()),
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
            num_stages=stages,
            **self.common,
        )
        return out

    def _norm(self, x: Tensor, y: Tensor, norm: RMSNorm, count: bool = False, embed: bool = False) -> Normed:
        """The norm of x + y, which x becomes; embed: of the rows of y [vocab, size] for `tokens`."""
        from fdk.models.fused import add_norm

        out, size = torch.empty_like(x), x.shape[1]
        add_norm[(self.batch,)](
            x,
            y,
            norm.weight,
            out,
            self.tokens,
            self.position,
            size,
            norm.eps,
            EMBED=embed,
            ADD=not embed,
            COUNT=count,
            BLOCK=1 << (size - 1).bit_length(),
            num_warps=8 if size > 2048 else 4,
            **self.common,
        )
        return Normed(out)

    def _gate(self, pair: Tensor) -> Tensor:
        from fdk.models.fused import gate

        size, block = pair.shape[1] // 2, 1024
        out = pair.new_empty(self.batch, size)
        gate[(-(-size // block), self.batch)](pair, out, size, BLOCK=block, num_warps=4, **self.common)
        return out

    def _attend(self, qkv: Tensor, index: int) -> Tensor:
        config, cache = self.config, self.cache
        attention = self.model.model.layers[index].self_attn
        norms = (attention.q_norm.weight, attention.k_norm.weight) if config.qk_norm else None
        out = qkv.new_empty(self.batch, config.num_attention_heads * config.head_dim)
        scale = math.log2(math.e) / math.sqrt(config.head_dim)
        operands = (qkv, cache.keys[index], cache.values[index], cache.cos, cache.sin)
        if self.attention is not None:
            eps = config.rms_norm_eps
            attend.attend(self.attention, *operands, self.position, out, scale, norms, eps, self.workspace)
            return out
        from fdk.models import fused

        block, warps, stages = _SHORT if self.splits == 1 else _LONG
        fused.attend[(self.batch * config.num_key_value_heads, self.splits)](
            *operands,
            *(norms or (qkv, qkv)),
            self.position,
            self.partial,
            self.arrived,
            out,
            cache.length,
            config.rms_norm_eps,
            scale,
            NORM=config.qk_norm,
            KV_HEADS=config.num_key_value_heads,
            HEADS=config.num_attention_heads // config.num_key_value_heads,
            HEAD_DIM=config.head_dim,
            ROWS=self.rows,
            CHUNK=self.chunk,
            SPLITS=self.splits,
            BLOCK=block,
            num_warps=warps,
            num_stages=stages,
            **self.common,
        )
        return out

    def _choose(self, logits: Tensor) -> None:
        """The most likely tokens; torch.argmax takes ten times as long over a few rows."""
        from fdk.models.fused import best, best_of_blocks

        size, pdl = logits.shape[1], {k: v for k, v in self.common.items() if k != "INTERPRETED"}
        blocks = -(-size // _LOGITS)
        value = torch.empty(self.batch, blocks, dtype=torch.float32, device=logits.device)
        index = torch.empty(self.batch, blocks, dtype=torch.int32, device=logits.device)
        best_of_blocks[(blocks, self.batch)](logits, value, index, size, BLOCK=_LOGITS, num_warps=4, **pdl)
        padded = 1 << (blocks - 1).bit_length()
        best[(self.batch,)](value, index, self.tokens, blocks, BLOCK=padded, num_warps=1, **pdl)
