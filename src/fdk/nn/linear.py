"""Linear: a drop-in for torch.nn.Linear that multiplies by a low-bit weight."""

from __future__ import annotations

from operator import is_

import torch
from torch import Tensor, nn

from fdk import ops
from fdk.arguments import as_integer, check_dense, check_tensor
from fdk.errors import FormatError
from fdk.packing.layouts import canonical_dtypes, canonical_shapes
from fdk.weight import QuantisedWeight, check_values, encode_spec

BUFFERS = ("codes", "planes", "mask", "scales", "table", "zeros")


class Linear(nn.Module):
    """y = x @ W.T + bias with a `QuantisedWeight` W [out_features, in_features].

    The state dict holds the canonical parts (`codes`, `scales`, and `table` or `zeros` where the format has them)
    whatever layout the kernels read in memory. x is [..., in_features] in the weight's dtype.

    kernel: "auto" or a kernel's name; a kernel that cannot serve the weight raises UnsupportedError.
    sqnr_db: signal to noise of the weight against the one it was made from, in dB, where that is known.
    """

    sqnr_db: float | None = None

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None = None, kernel: str = "auto") -> None:
        ops.check_weight(weight)
        if bias is not None:
            check_tensor(bias, "bias")
            if bias.shape != (weight.geometry.n,):
                raise FormatError(f"bias has shape {list(bias.shape)}, but {weight!r} needs [{weight.geometry.n}]")
        super().__init__()
        self.kernel = kernel
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._hold(weight)

    @classmethod
    def empty(cls, geometry, bias: bool, kernel: str = "auto", zeros_dtype: torch.dtype = torch.uint8) -> Linear:
        """A module on the meta device, to be filled by `load_state_dict(..., assign=True)`."""
        dtypes = canonical_dtypes(geometry, zeros_dtype)
        parts = {
            name: torch.empty(shape, dtype=dtypes[name], device="meta")
            for name, shape in canonical_shapes(geometry).items()
        }
        filler = torch.empty(geometry.n, dtype=geometry.dtype, device="meta") if bias else None
        return cls(QuantisedWeight(geometry, parts), filler, kernel)

    def _hold(self, weight: QuantisedWeight) -> None:
        ops.prepare(weight, self.kernel)
        for name in getattr(self, "_part_names", ()):
            del self._buffers[name]
        for name, part in weight.parts.items():
            self.register_buffer(name, part)
        self._part_names = tuple(weight.parts)
        self._spec = encode_spec(weight)
        self._weight = weight
        self._served = {}

    def adopt(self, name: str = "weight") -> None:
        """Take the canonical tensors that a loader has put in place of the module's buffers, of any float dtype.

        FormatError, naming `name`, if they do not fit the module or hold a value that is not finite.
        """
        old = self._weight.geometry
        parts = {part: self._buffers[part] for part in canonical_shapes(old)}
        weight = QuantisedWeight.from_parts(old.format, old.k, parts, old.row_ends, name)
        self._hold(weight)

    @property
    def weight(self) -> QuantisedWeight:
        """The weight, in the layout that the kernels read."""
        return self._weight

    def set_precision(self, bits: int) -> None:
        """Serve a nested weight at another width from now on; its tensors stay where they are.

        Takes microseconds. What a CUDA graph captured keeps the width it was captured with. FormatError if the weight
        is not nested or has no such slice.
        """
        bits = as_integer(bits, "bits")
        if bits not in self._served:
            weight = self._weight.at(bits)
            self._served[bits] = weight, encode_spec(weight)
        self._weight, self._spec = self._served[bits]

    @property
    def in_features(self) -> int:
        return self._weight.geometry.k

    @property
    def out_features(self) -> int:
        return self._weight.geometry.n

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            check_tensor(x, "x")
        bias, dtype = self._parameters["bias"], self._weight.geometry.dtype
        if x.dtype != dtype:
            x = ops.autocast_operand(x, dtype)
        if (
            ops.must_dispatch(x)
            or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
            # torch.func.functional_call and offloading put other tensors in the place of the module's own.
            or not all(map(is_, self._buffers.values(), self._weight.parts.values()))
        ):
            parts = [self._buffers[name] for name in self._part_names]
            return torch.ops.fdk.linear(x, parts, bias, self._spec, self.kernel)
        return ops.run(x, self._weight, bias, self.kernel)

    def extra_repr(self) -> str:
        geometry = self._weight.geometry
        return (
            f"in_features={geometry.k}, out_features={geometry.n}, format={geometry.format}, "
            f"dtype={geometry.dtype}, bias={self.bias is not None}, kernel={self.kernel}"
        )

    def _apply(self, fn, recurse: bool = True) -> Linear:
        """Move or cast: the canonical parts go through `fn`, then take the layout of the new device."""
        weight = self._weight.canonical()
        parts = {name: fn(part) for name, part in weight.parts.items()}
        old = weight.geometry
        geometry = type(old)(old.format, old.n, old.k, parts["scales"].dtype, old.row_ends)
        if geometry.dtype != old.dtype:
            check_values(geometry, parts)
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.detach()), requires_grad=self.bias.requires_grad)
        self._hold(QuantisedWeight(geometry, parts))
        return self

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        for name, part in self._weight.canonical().parts.items():
            destination[prefix + name] = part
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        geometry = self._weight.geometry
        shapes = canonical_shapes(geometry)
        wanted = [*shapes, *(["bias"] if self.bias is not None else [])]
        missing = [prefix + name for name in wanted if prefix + name not in state_dict]
        missing_keys.extend(missing)
        known = {prefix + name for name in (*BUFFERS, "bias")}
        unexpected_keys.extend(
            key
            for key in state_dict
            if key.startswith(prefix) and key in known and key.removeprefix(prefix) not in wanted
        )
        if missing:
            return
        device = self._weight.device
        parts = {name: state_dict[prefix + name] for name in shapes}
        try:
            for name in wanted:
                check_dense(part := state_dict[prefix + name], prefix + name)
                if part.is_meta and device.type != "meta":
                    raise FormatError(f"{prefix}{name} lies on the meta device; load the checkpoint's values first")
            if device.type != "meta":
                parts = {name: part.to(device) for name, part in parts.items()}
            for name, shape in shapes.items():
                # A table may be short: `from_parts` widens it.
                if name != "table" and parts[name].shape != shape:
                    raise FormatError(
                        f"{prefix}{name} is {list(parts[name].shape)}, but {list(shape)} in a {geometry.format} layer "
                        f"[{geometry.n}, {geometry.k}]; load the matching checkpoint"
                    )
            name = prefix.rstrip(".") or "weight"
            weight = QuantisedWeight.from_parts(geometry.format, geometry.k, parts, geometry.row_ends, name)
        except FormatError as error:
            error_msgs.append(str(error))
            return
        if self.bias is not None:
            self.bias = nn.Parameter(state_dict[prefix + "bias"].to(parts["scales"].device), requires_grad=False)
        self._hold(weight)
