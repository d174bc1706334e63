"""The plugin's linear method alone, where vLLM need not be installed: what it leaves on a device, what it launches."""

from __future__ import annotations

import ctypes
import gc
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

import fdk
from fdk import ops, testing
from fdk.integrations.vllm.sources import Quantising, Stored
from fdk.nn.convert import Recipe

CAPTURED = (1, 2, 16)
K = 4096
ROWS = {"q_proj": 2048, "k_proj": 512, "v_proj": 512}
SAME = dict.fromkeys(ROWS, "lut4_g64")
MIXED = {"q_proj": "int4_g64", "k_proj": "nest8s4_g128", "v_proj": "uint3_g64"}
_KERNEL_NODE = 0


@pytest.fixture(scope="module")
def linear():
    """The module of the method, on a stand-in for the few names of vLLM that it uses."""
    config = SimpleNamespace(
        load_config=SimpleNamespace(load_format="auto"),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=list(CAPTURED)),
    )
    interfaces = SimpleNamespace(
        LinearMethodBase=object,
        current_config=lambda: config,
        tensor_parallel_rank=lambda: 0,
        tensor_parallel_size=lambda: 1,
    )
    package, name = import_module("fdk.integrations.vllm"), "fdk.integrations.vllm.linear"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fdk.integrations.vllm.interfaces", interfaces)
        patch.setattr(package, "interfaces", interfaces, raising=False)
        patch.delitem(sys.modules, name, raising=False)
        patch.delattr(package, "linear", raising=False)
        yield import_module(name)
        del sys.modules[name], package.linear


def weights_of(formats: dict[str, str], shrink: int = 1) -> dict[str, fdk.QuantisedWeight]:
    return {
        name: testing.random_weight(fdk.parse(fmt), ROWS[name] // shrink, K // shrink, seed=seed)
        for seed, (name, fmt) in enumerate(formats.items())
    }


def load(linear, tensors: dict[str, dict[str, torch.Tensor]], source, device: str, shrink: int = 1):
    """(method, layer) after vLLM's calls: weights created, every part handed to its loader, then processed."""
    method = linear.FdkLinearMethod(SimpleNamespace(source=source), list(tensors))
    layer, sizes = torch.nn.Module(), [ROWS[name] // shrink for name in tensors]
    with torch.device(device):
        method.create_weights(layer, K // shrink, sizes, K // shrink, sum(sizes), torch.bfloat16)
    for shard, parts in enumerate(tensors.values()):
        for part, tensor in parts.items():
            parameter = getattr(layer, part)
            parameter.weight_loader(parameter, tensor, shard)
    method.process_weights_after_loading(layer)
    return method, layer


def load_stored(linear, formats: dict[str, str], device: str, shrink: int = 1):
    weights = weights_of(formats, shrink)

    def source(name, place, dtype, device):
        return Stored(name, weights[name].geometry, place, device)

    return *load(linear, {name: weight.parts for name, weight in weights.items()}, source, device, shrink), weights


@pytest.mark.parametrize("formats", [SAME, MIXED], ids=["same", "mixed"])
def test_it_multiplies_as_the_projections_do(linear, formats) -> None:
    method, layer, weights = load_stored(linear, formats, "cpu", shrink=8)
    assert len(layer.fdk_products) == len(set(formats.values()))
    x = torch.randn(3, K // 8).bfloat16()
    bias = torch.randn(sum(ROWS.values()) // 8).bfloat16()
    parts = bias.split([weight.shape[0] for weight in weights.values()])
    expected = [ops.run(x, weight, part) for weight, part in zip(weights.values(), parts, strict=True)]
    assert torch.equal(method.apply(layer, x, bias), torch.cat(expected, -1))


def bytes_of(layer: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())


def load_online(linear, device: str):
    def source(name, place, dtype, device):
        return Quantising(name, Recipe(fdk.parse("lut4_g64"), codebook="kmeans"), place, dtype, device)

    dense = {name: {"weight": torch.randn(n, K).bfloat16()} for name, n in ROWS.items()}
    return load(linear, dense, source, device)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["same", "mixed", "online"])
def test_a_loaded_layer_holds_its_packed_tensors_and_nothing_dense(linear, kind) -> None:
    def loaded():
        if kind == "online":
            return load_online(linear, "cuda")
        return load_stored(linear, SAME if kind == "same" else MIXED, "cuda")

    # What a device gets once: kernels, flags, workspaces of libraries.
    loaded()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    _, layer, *_ = loaded()
    gc.collect()
    torch.cuda.synchronize()
    held, packed = torch.cuda.memory_allocated() - before, bytes_of(layer)
    dense = 2 * K * sum(ROWS.values())
    assert packed < dense / 3
    # Half of what the smallest projection would be in 16 bits is left for rounding up and for what kernels keep.
    assert packed <= held < packed + K * min(ROWS.values()), (held, packed, dense)


def nodes(call) -> tuple[torch.cuda.CUDAGraph, object, list[int]]:
    """The CUDA graph of a call, what the call returned, and the types of the graph's nodes."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        returned = call()
    driver, handle, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    assert driver.cuGraphGetNodes(handle, None, ctypes.byref(count)) == 0
    found = (ctypes.c_void_p * count.value)()
    assert driver.cuGraphGetNodes(handle, found, ctypes.byref(count)) == 0
    types = []
    for node in found:
        kind = ctypes.c_int(-1)
        assert driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == 0
        types.append(kind.value)
    return graph, returned, types


def product_nodes(product, x: torch.Tensor) -> list[int]:
    """Types of the nodes that a product's kernel, called by nothing else, makes."""
    kernel = product.weight.choices[(x.shape[0], "auto")]
    out = torch.empty(x.shape[0], product.rows, dtype=x.dtype, device=x.device)
    return nodes(lambda: kernel.linear(x, product.weight, None, out))[2]


@pytest.mark.gpu
@pytest.mark.parametrize("m", CAPTURED)
@pytest.mark.parametrize("formats", [SAME, MIXED], ids=["same", "mixed"])
def test_a_graph_holds_the_kernels_of_the_products_and_nothing_else(linear, formats, m) -> None:
    method, layer, _ = load_stored(linear, formats, "cuda")
    x = torch.randn(m, K, device="cuda").bfloat16()
    expected = method.apply(layer, x)
    graph, out, found = nodes(lambda: method.apply(layer, x))
    expected_nodes = [kind for product in layer.fdk_products for kind in product_nodes(product, x)]
    # Projections that differ in format are put beside each other by one more kernel.
    expected_nodes += [_KERNEL_NODE] * (len(layer.fdk_products) > 1)
    assert sorted(found) == sorted(expected_nodes)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_the_op_of_compiled_graphs_launches_the_same(linear) -> None:
    _, layer, _ = load_stored(linear, SAME, "cuda")
    (product,) = layer.fdk_products
    parts = [getattr(layer, name) for name in product.names]
    for m in CAPTURED:
        x = torch.randn(m, K, device="cuda").bfloat16()
        expected = ops.run(x, product.weight, None)
        graph, out, found = nodes(lambda: torch.ops.fdk.linear(x, parts, None, product.spec, "auto"))  # noqa: B023
        assert found == product_nodes(product, x)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)
