"""Tensor-parallel linear layers over plain torch.distributed: each process holds one shard of the weight.

Column-parallel cuts the rows of W (its outputs), row-parallel the columns (its inputs). A column-parallel layer with a
row-parallel one behind it needs a single sum over the processes. Bias goes with its rows, or to process 0 alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fdk.errors import FormatError
from fdk.nn.linear import Linear
from fdk.packing.slices import COLUMNS, ROWS


class _Summed(torch.autograd.Function):
    """The sum over the processes; its gradient is the same on all of them and goes to each."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _Copied(torch.autograd.Function):
    """The input as it is, used by every process; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Gathered(torch.autograd.Function):
    """[..., n / world] of every process beside each other; each takes its own part of the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.rank, ctx.world = dist.get_rank(group), dist.get_world_size(group)
        pieces = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ctx.world)]
        dist.all_gather(pieces, x.contiguous(), group=group)
        return torch.cat(pieces, -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.chunk(ctx.world, -1)[ctx.rank], None


class ParallelLinear(Linear):
    """A layer whose weight is one shard; `dim`, `rank` and `world` say of what."""

    dim: int

    def __init__(self, weight, bias: Tensor | None, kernel: str, group: dist.ProcessGroup | None) -> None:
        super().__init__(weight, bias, kernel)
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    @classmethod
    def _shard_of(cls, layer: Linear, group: dist.ProcessGroup | None, name: str):
        if not dist.is_available() or not dist.is_initialized():
            raise FormatError(f"{name}: no process group exists; call torch.distributed.init_process_group first")
        if isinstance(layer, ParallelLinear):
            raise FormatError(f"{name} is a shard already; give the whole layer")
        return layer.weight.shard(cls.dim, dist.get_rank(group), dist.get_world_size(group), f"{name}.weight")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shard {self.rank} of {self.world}"


class ColumnParallelLinear(ParallelLinear):
    """y[..., n / world] of this process, or all n with `gather`; x [..., k] is the same on all processes.

    Make it with `from_linear`. The state dict holds this process's rows.
    """

    dim = ROWS

    def __init__(self, weight, bias: Tensor | None, kernel: str, group, gather: bool = False) -> None:
        super().__init__(weight, bias, kernel, group)
        self.gather = gather

    @classmethod
    def from_linear(
        cls, layer: Linear, group: dist.ProcessGroup | None = None, *, gather: bool = False, name: str = "layer"
    ) -> ColumnParallelLinear:
        """This process's rows of an fdk.nn.Linear; `group` None is the default one.

        FormatError, naming `name`, if n is not a multiple of the number of processes.
        """
        shard = cls._shard_of(layer, group, name)
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        bias = None if layer.bias is None else layer.bias.detach().chunk(world)[rank].clone()
        return cls(shard, bias, layer.kernel, group, gather)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(_Copied.apply(x, self.group))
        return _Gathered.apply(y, self.group) if self.gather else y


class RowParallelLinear(ParallelLinear):
    """y [..., n], the same on all processes; x [..., k / world] is this process's part, or [..., k] with `split`.

    Make it with `from_linear`. The state dict holds this process's columns, that of process 0 the bias too.
    """

    dim = COLUMNS

    def __init__(self, weight, bias: Tensor | None, kernel: str, group, split: bool = False) -> None:
        super().__init__(weight, bias, kernel, group)
        self.split = split

    @classmethod
    def from_linear(
        cls, layer: Linear, group: dist.ProcessGroup | None = None, *, split: bool = False, name: str = "layer"
    ) -> RowParallelLinear:
        """This process's columns of an fdk.nn.Linear; `group` None is the default one.

        FormatError, naming `name`, if k is not a multiple of the processes times the columns that share a scale.
        """
        shard = cls._shard_of(layer, group, name)
        mine = layer.bias is not None and dist.get_rank(group) == 0
        return cls(shard, layer.bias.detach().clone() if mine else None, layer.kernel, group, split)

    def forward(self, x: Tensor) -> Tensor:
        if self.split:
            x = _Copied.apply(x, self.group).chunk(self.world, -1)[self.rank]
        return _Summed.apply(super().forward(x), self.group)
