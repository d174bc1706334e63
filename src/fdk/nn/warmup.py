"""warmup: compile and load everything that a model's products need before the first of them is timed or captured."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from fdk.arguments import as_integers, check_module
from fdk.errors import FormatError
from fdk.nn.linear import Linear


@torch.no_grad()
def warmup(model: nn.Module, batch_sizes: Iterable[int] = (1,)) -> int:
    """Run every fdk.nn.Linear of `model` once for each number of rows; returns how many products that were.

    Kernels are compiled and loaded at their first call, which a CUDA graph cannot capture: warm up before the capture.
    batch_sizes: rows of activations (batch times sequence) of the calls to come. FormatError if one is negative, or
    if a layer lies on the meta device.
    """
    check_module(model, "model")
    sizes = as_integers(batch_sizes, "batch_sizes")
    if bad := [m for m in sizes if m < 0]:
        raise FormatError(f"batch_sizes holds {bad[0]}; give numbers of rows, 0 or more")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    on_gpu = [layer for _, layer in layers if layer.weight.device.type == "cuda"]
    if on_gpu:
        from fdk.kernels.cuda import compile_ahead

        compile_ahead([layer.weight for layer in on_gpu if layer.kernel in ("auto", "cuda")], sizes)
    for name, layer in layers:
        weight = layer.weight
        if weight.device.type == "meta":
            raise FormatError(f"{name or 'the layer'} lies on the meta device; load the weights first")
        for m in sizes:
            layer(torch.zeros(m, weight.geometry.k, dtype=weight.dtype, device=weight.device))
    if on_gpu:
        torch.cuda.synchronize()
    return len(layers) * len(sizes)
