"""The only dispatch layer: the op `fdk::linear`, its fake, out variant and gradient, and `explain`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fdk import reference
from fdk.arguments import check_dtype, check_tensor, shown
from fdk.errors import FormatError, UnsupportedError
from fdk.kernels import Choice, Problem, choose, reason_against, rows_text
from fdk.kernels import kernel as kernel_named
from fdk.packing.layouts import DTYPES, Geometry
from fdk.weight import QuantisedWeight, decode_spec, encode_spec, from_spec

_library = torch.library.Library("fdk", "DEF")
_library.define("linear(Tensor x, Tensor[] parts, Tensor? bias, str spec, str kernel) -> Tensor")
_library.define("linear_out(Tensor x, Tensor[] parts, Tensor? bias, str spec, str kernel, Tensor(a!) out) -> ()")
_library.define("linear_grad(Tensor grad, Tensor[] parts, str spec) -> Tensor")


_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling, _tracing_state = torch.compiler.is_compiling, torch._C._get_tracing_state


def must_dispatch(x: Tensor) -> bool:
    """Whether the product has to be an op of the dispatcher, because calls are compiled, traced, faked or rewritten.

    A kernel called directly reads memory, which a fake tensor has not, and leaves no trace in what records ops.
    """
    return _is_compiling() or type(x) not in _PLAIN or is_in_torch_dispatch_mode() or _tracing_state() is not None


def autocast_operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in the weight's dtype where autocast is on, as torch.nn.functional.linear would have it; else x as it is."""
    if x.dtype != dtype and x.is_floating_point() and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return x.to(dtype)
    return x


def check_weight(weight: QuantisedWeight) -> None:
    """FormatError unless it is a QuantisedWeight; a module's is its `weight`."""
    if not isinstance(weight, QuantisedWeight):
        remedy = "give its .weight" if isinstance(getattr(weight, "weight", None), QuantisedWeight) else "quantise it"
        raise FormatError(f"weight is {shown(weight)}, not a QuantisedWeight; {remedy}")


def check_operands(x: Tensor, geometry: Geometry, device: torch.device, bias: Tensor | None) -> None:
    """FormatError unless x [..., k] and bias [n] fit a weight of this geometry on `device`."""
    shape = x.shape
    if not shape or shape[-1] != geometry.k:
        raise FormatError(
            f"x has shape {list(shape)}, but the weight [{geometry.n}, {geometry.k}] needs [..., {geometry.k}]"
        )
    if x.dtype != geometry.dtype:
        raise FormatError(
            f"x is {x.dtype}, but the weight holds {geometry.dtype} scales; "
            "convert x, or the weight with weight.to(dtype=x.dtype)"
        )
    if x.device != device:
        raise FormatError(f"x lies on {x.device}, but the weight on {device}; move one of them with .to(...)")
    if bias is None:
        return
    check_tensor(bias, "bias")
    if bias.shape != (geometry.n,) or bias.dtype != x.dtype or bias.device != device:
        raise FormatError(
            f"bias must be {x.dtype} [{geometry.n}] on {device}, not {bias.dtype} {list(bias.shape)} on {bias.device}"
        )


def run(
    x: Tensor, weight: QuantisedWeight, bias: Tensor | None, kernel: str = "auto", out: Tensor | None = None
) -> Tensor:
    """x [..., k] times the weight's transpose plus bias, [..., n], by the kernel that `choose` picks; no autograd.

    The choice is remembered in the weight, because hashing a problem costs more than a small product.
    """
    geometry = weight.geometry
    check_operands(x, geometry, weight.device, bias)
    shape, n = x.shape, geometry.n
    flat = len(shape) == 2
    rows = shape[0] if flat else shape[:-1].numel()
    key = (rows, kernel)
    chosen = weight.choices.get(key)
    if chosen is None:
        chosen = weight.remember(key, choose(Problem(rows, geometry, x.device), kernel).kernel)
    fresh = out is None
    if fresh:
        out = x.new_empty((rows, n) if flat else (*shape[:-1], n))
    if rows == 0 or n == 0:
        return out
    if weight.layout != chosen.layout:
        weight = weight.to_layout(chosen.layout)
    x2d = x if flat and x.is_contiguous() else x.reshape(rows, geometry.k).contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if fresh or out.is_contiguous():
        chosen.linear(x2d, weight, bias, out if flat else out.view(rows, n))
    else:
        dense = torch.empty((rows, n), dtype=x.dtype, device=x.device)
        chosen.linear(x2d, weight, bias, dense)
        out.copy_(dense.view(out.shape))
    return out


def _linear(x: Tensor, parts: list[Tensor], bias: Tensor | None, spec: str, kernel: str) -> Tensor:
    return run(x, from_spec(spec, parts), bias, kernel)


def _linear_out(x: Tensor, parts: list[Tensor], bias: Tensor | None, spec: str, kernel: str, out: Tensor) -> None:
    geometry, _, _ = decode_spec(spec)
    if out.shape != (*x.shape[:-1], geometry.n) or out.dtype != x.dtype or out.device != x.device:
        raise FormatError(
            f"out must be {x.dtype} {[*x.shape[:-1], geometry.n]} on {x.device}, "
            f"not {out.dtype} {list(out.shape)} on {out.device}"
        )
    run(x, from_spec(spec, parts), bias, kernel, out)


def _linear_grad(grad: Tensor, parts: list[Tensor], spec: str) -> Tensor:
    geometry, _, _ = decode_spec(spec)
    flat = grad.reshape(-1, geometry.n)
    weight = from_spec(spec, parts)
    kernel = _dequantising_kernel(weight)
    grad_x = flat @ dequantise(weight) if kernel is None else kernel.grad(flat, weight)
    return grad_x.view(*grad.shape[:-1], geometry.k)


def _linear_fake(x: Tensor, parts: list[Tensor], bias: Tensor | None, spec: str, kernel: str) -> Tensor:
    geometry, _, _ = decode_spec(spec)
    check_operands(x, geometry, parts[0].device, bias)
    return x.new_empty((*x.shape[:-1], geometry.n))


def _linear_out_fake(x: Tensor, parts: list[Tensor], bias: Tensor | None, spec: str, kernel: str, out: Tensor) -> None:
    return None


def _linear_grad_fake(grad: Tensor, parts: list[Tensor], spec: str) -> Tensor:
    geometry, _, _ = decode_spec(spec)
    return grad.new_empty((*grad.shape[:-1], geometry.k))


def _setup_context(ctx, inputs, output) -> None:
    _, parts, _, ctx.spec, _ = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx, grad: Tensor):
    parts = list(ctx.saved_tensors)
    grad_x = torch.ops.fdk.linear_grad(grad, parts, ctx.spec) if ctx.needs_input_grad[0] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return grad_x, [None] * len(parts), grad_bias, None, None


def _grad_setup(ctx, inputs, output) -> None:
    _, parts, ctx.spec = inputs
    ctx.save_for_backward(*parts)


def _grad_backward(ctx, grad: Tensor):
    # The gradient is linear in what flows in, and its transpose is the product itself.
    parts = list(ctx.saved_tensors)
    again = torch.ops.fdk.linear(grad, parts, None, ctx.spec, "auto") if ctx.needs_input_grad[0] else None
    return again, [None] * len(parts), None


for _name, _function, _fake in (
    ("linear", _linear, _linear_fake),
    ("linear_out", _linear_out, _linear_out_fake),
    ("linear_grad", _linear_grad, _linear_grad_fake),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fdk::{_name}", _fake, lib=_library)
torch.library.register_autograd("fdk::linear", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("fdk::linear_grad", _grad_backward, setup_context=_grad_setup, lib=_library)


def linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, *, kernel: str = "auto") -> Tensor:
    """x [..., k] @ W.T + bias -> [..., n], with W dequantised inside the kernel.

    x must have the weight's dtype and device. The weight is first brought into the layout that its device's
    kernels read, in place, so that one copy serves every batch size. The gradient flows to x and bias.

    kernel: "auto", or a name from `fdk.kernels.names()`, which raises UnsupportedError if it cannot serve the call.
    """
    check_weight(weight)
    check_tensor(x, "x")
    prepare(weight, kernel)
    x = autocast_operand(x, weight.dtype)
    if torch.is_grad_enabled() or must_dispatch(x):
        if bias is not None:
            check_tensor(bias, "bias")
        return torch.ops.fdk.linear(x, list(weight.parts.values()), bias, encode_spec(weight), kernel)
    return run(x, weight, bias, kernel)


def prepare(weight: QuantisedWeight, kernel: str = "auto") -> QuantisedWeight:
    """Bring the weight, in place, into the layout of the kernel that serves it on its device. Returns the weight."""
    if weight.device.type != "meta":
        wanted = choose(Problem(1, weight.geometry, weight.device), kernel).kernel.layout
        if weight.layout != wanted:
            weight.relayout_(wanted)
    return weight


def dequantise(weight: QuantisedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight [n, k], each value rounded once to `dtype` (default: the weight's)."""
    check_weight(weight)
    if dtype is not None:
        check_dtype(dtype, "dtype", (*DTYPES, torch.float64))
    kernel = _dequantising_kernel(weight) if dtype in (None, weight.dtype) else None
    return reference.dequantise(weight, dtype) if kernel is None else kernel.dequantise(weight)


def _dequantising_kernel(weight: QuantisedWeight):
    """The kernel that turns `weight` into a dense one where it lies, in the layout that it has; None if none does."""
    if weight.device.type != "cuda" or 0 in weight.shape:
        return None
    candidate = kernel_named("cuda")
    problem = Problem(1, weight.geometry, weight.device)
    return candidate if weight.layout == candidate.layout and reason_against(candidate, problem) is None else None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; print it."""

    choice: Choice
    others: tuple[tuple[str, str], ...]
    note: str | None = None

    def __str__(self) -> str:
        problem = self.choice.problem
        geometry = problem.geometry
        weight = f"{geometry.format} [{geometry.n}, {geometry.k}] {geometry.dtype}"
        lines = [
            f"{weight} times {rows_text(problem.m)} on {problem.device}:",
            f"  {self.choice.kernel.name}  chosen, layout {self.choice.kernel.layout}",
        ]
        if describe := getattr(self.choice.kernel, "describe", None):
            lines.append(f"    {describe(problem)}")
        if self.note:
            lines.append(f"    {self.note}")
        lines += [f"  {name}  passed over: {reason}" for name, reason in self.choice.rejected]
        lines += [f"  {name}  {reason}" for name, reason in self.others]
        return "\n".join(lines)


def explain(x: Tensor, weight: QuantisedWeight, kernel: str = "auto") -> Explanation:
    """Which kernel serves x [..., k] times the weight, and why the others were passed over."""
    check_weight(weight)
    check_tensor(x, "x")
    geometry = weight.geometry
    check_operands(x, geometry, weight.device, None)
    explanation = explain_problem(Problem(x.numel() // max(1, geometry.k), geometry, x.device), kernel)
    note = None
    if not x.is_contiguous():
        note = "x is copied first: its elements are not contiguous"
    elif explanation.choice.kernel.name == "cuda" and x.storage_offset() * x.element_size() % 16:
        note = "x is copied first: it does not start at a multiple of 16 bytes"
    return replace(explanation, note=note)


def explain_problem(problem: Problem, kernel: str = "auto") -> Explanation:
    """The same for a product that is described, not made."""
    from fdk.kernels import names

    choice = choose(problem, kernel)
    seen = {choice.kernel.name, *(name for name, _ in choice.rejected)}
    others = []
    for name in names():
        if name not in seen:
            reason = reason_against(kernel_named(name), problem)
            others.append((name, f"not needed: {reason}" if reason else "able, but later in the order of preference"))
    return Explanation(choice, tuple(others))


__all__ = ["Explanation", "UnsupportedError", "dequantise", "explain", "explain_problem", "linear", "prepare", "run"]
