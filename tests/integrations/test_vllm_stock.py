"""vLLM's GPTQ and AWQ layouts, as its parameters hold them, become the weights that they describe."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from fdk import linear, parse, reference, testing
from fdk.packing.bits import pack_codes

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; `make test-vllm` sets it up")

N, K, GROUP = 64, 128, 32


def parameter(data: torch.Tensor, **dims: int) -> torch.nn.Parameter:
    made = torch.nn.Parameter(data.contiguous(), requires_grad=False)
    for name, value in dims.items():
        setattr(made, name, value)
    return made


def words(stream: torch.Tensor) -> torch.Tensor:
    return stream.contiguous().view(torch.int32)


@pytest.mark.parametrize("name", ["int4_g32", "int8_g32", "int4_chan", "uint4_g32"])
def test_weights_of_stock_layers(name: str) -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    from fdk.integrations.vllm.stock import FdkLinearKernel

    fmt = parse(name)
    expected = testing.random_weight(fmt, N, K)
    types = {("int", 4): scalar_types.uint4b8, ("int", 8): scalar_types.uint8b128, ("uint", 4): scalar_types.uint4}
    config = MPLinearLayerConfig(
        full_weight_shape=(K, N), partition_weight_shape=(K, N), weight_type=types[fmt.kind.name, fmt.bits],
        act_type=torch.bfloat16, group_size=fmt.group or -1, zero_points=fmt.has_zeros,
    )  # fmt: skip
    assert FdkLinearKernel.can_implement(config) == (True, None)
    layer = torch.nn.Module()
    layer.qweight = parameter(words(expected.parts["codes"]).T, input_dim=0, output_dim=1, packed_dim=0)
    layer.scales = parameter(expected.parts["scales"].T, **({"input_dim": 0} if fmt.group else {}), output_dim=1)
    if fmt.has_zeros:
        zeros = words(pack_codes(expected.parts["zeros"].T.contiguous(), fmt.bits))
        layer.qzeros = parameter(zeros.T, input_dim=1, output_dim=0, packed_dim=0)
    else:
        layer.qzeros = parameter(torch.zeros(1, N // 8, dtype=torch.int32), output_dim=1)
    kernel = FdkLinearKernel(config, "qweight", "scales", "qzeros")
    kernel.process_weights_after_loading(layer)
    assert torch.equal(reference.dequantise(layer.fdk_products[0].weight), reference.dequantise(expected))
    assert all(name.startswith("fdk") for name, _ in layer.named_parameters())
    x = torch.randn(3, K).bfloat16()
    assert torch.equal(kernel.apply_weights(layer, x), linear(x, expected))


def test_what_is_not_a_format_is_left_to_others() -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    from fdk.integrations.vllm.stock import FdkLinearKernel

    def refused(kind, group=32, zeros=False, act=torch.bfloat16) -> str | None:
        sizes = {"full_weight_shape": (K, N), "partition_weight_shape": (K, N)}
        return FdkLinearKernel.can_implement(
            MPLinearLayerConfig(weight_type=kind, act_type=act, group_size=group, zero_points=zeros, **sizes)
        )[1]

    assert refused(scalar_types.uint4b8) is None
    assert "no format for" in refused(scalar_types.uint4b8, zeros=True)
    assert "no format for" in refused(scalar_types.float8_e4m3fn)
    assert "group of 24" in refused(scalar_types.uint4b8, group=24)
    assert "not torch.float8" in refused(scalar_types.uint4b8, act=torch.float8_e4m3fn)
