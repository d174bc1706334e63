"""What only a GPU shows beyond the contract suite: capture, streams, order of writes, short memory."""

import pytest
import torch

from fdk import reference, testing
from fdk.formats import parse
from fdk.kernels.cuda import KERNEL, _routes, decode, stream_floor, warmup

pytestmark = pytest.mark.gpu


def weight_of(name: str, n: int, k: int, **more):
    return testing.random_weight(parse(name), n, k, device="cuda:0", **more).to_layout("fragments")


def inputs(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype).cuda()


def test_repeated_products_are_bit_equal() -> None:
    # A refill that overtook loads in flight showed in one call of thirty at 2 bits, and in none of 388 single checks.
    for name in (
        *(f"lut{bits}_g64" for bits in range(1, 9)),
        "nest8s2_g64",
        "nest8s4_g128",
        "nest8_g64",
        "trunc8s2_g64",
    ):
        weight = weight_of(name, 1088, 8192)
        for m in (1, 2, 8, 16, 64):
            x = inputs(m, 8192)
            first, again = (testing.poisoned(m, 1088, torch.bfloat16, "cuda:0") for _ in range(2))
            KERNEL.linear(x, weight, None, first)
            wrong = torch.zeros((), dtype=torch.int64, device="cuda:0")
            for _ in range(200):
                again.fill_(float("nan"))
                KERNEL.linear(x, weight, None, again)
                wrong += (again != first).any()
            assert int(wrong) == 0, (name, m)


def test_a_graph_of_dense_products_replays() -> None:
    weight, x = weight_of("lut4_g64", 512, 1024), inputs(300, 1024)
    call = KERNEL._bind(
        weight, 300, tuple(r for r in _routes(weight.geometry, None, 300, weight.device) if r.name == "dense")
    )
    expected, out = (testing.poisoned(300, 512, torch.bfloat16, "cuda:0") for _ in range(2))
    call(x, None, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(x, None, out)
    # What the allocator hands out in between must not be the graph's scratch.
    junk = [torch.full((512, 1024), float("nan"), dtype=torch.bfloat16, device="cuda:0") for _ in range(4)]
    graph.replay()
    assert torch.equal(out, expected) and all(one.isnan().all() for one in junk)


def test_misaligned_activations() -> None:
    weight = weight_of("int4_g64", 128, 256)
    x = torch.randn(2 * 256 + 1, device="cuda:0").bfloat16()[1:].view(2, 256)
    assert x.data_ptr() % 16
    assert testing.check_product(KERNEL.linear, x, weight, None, False) is None


def test_capture_without_warmup_is_a_clear_error_and_with_it_replays() -> None:
    weight, x = weight_of("lut3_g64", 192, 704), inputs(3, 704)
    out = testing.poisoned(3, 192, torch.bfloat16, "cuda:0")
    with pytest.raises(RuntimeError, match="warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        KERNEL.linear(x, weight, None, out)
    torch.cuda.synchronize()
    warmup([weight], rows=(3,))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        KERNEL.linear(x, weight, None, out)
    expected = testing.poisoned(3, 192, torch.bfloat16, "cuda:0")
    KERNEL.linear(x, weight, None, expected)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)


def test_chained_layers_see_the_output_of_the_launch_in_front() -> None:
    # Each product reads what the one before wrote, and writes what that one read: with programmatic dependent launch
    # any access before the dependency wait would show as a difference from the same chain run one by one.
    n = 2048
    weights = [weight_of("int4_g64", n, n, seed=seed) for seed in range(6)]
    for weight in weights:
        weight.parts["scales"].mul_(2.0**-7)
    start = inputs(1, n)
    alone = start.clone()
    for weight in weights * 4:
        out = torch.empty_like(alone)
        KERNEL.linear(alone, weight, None, out)
        torch.cuda.synchronize()
        alone = out
    for _ in range(20):
        a, b = start.clone(), torch.empty_like(start)
        for weight in weights * 4:
            KERNEL.linear(a, weight, None, b)
            a, b = b, a
        assert torch.equal(a, alone)


def test_streams_do_not_disturb_each_other() -> None:
    weights = [weight_of("lut2_g64", 1024, 2048, seed=seed) for seed in range(2)]
    xs = [inputs(1, 2048), inputs(1, 2048) + 1]
    expected = []
    for weight, x in zip(weights, xs, strict=True):
        out = torch.empty(1, 1024, dtype=torch.bfloat16, device="cuda:0")
        KERNEL.linear(x, weight, None, out)
        expected.append(out)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in weights]
    outs = [[testing.poisoned(1, 1024, torch.bfloat16, "cuda:0") for _ in range(50)] for _ in weights]
    torch.cuda.synchronize()
    for i in range(50):
        for stream, weight, x, out in zip(streams, weights, xs, outs, strict=True):
            with torch.cuda.stream(stream):
                KERNEL.linear(x, weight, None, out[i])
    torch.cuda.synchronize()
    for out, right in zip(outs, expected, strict=True):
        assert all(torch.equal(one, right) for one in out)


def test_packing_on_the_gpu_equals_packing_on_the_cpu() -> None:
    weight = testing.random_weight(parse("lut5_g64"), 300, 640, tables=2)
    there = {name: part.cuda() for name, part in weight.parts.items()}
    moved = type(weight)(weight.geometry, there).to_layout("fragments")
    for name, part in weight.to_layout("fragments").parts.items():
        assert torch.equal(moved.parts[name].cpu(), part)


@pytest.mark.parametrize(
    "name,n,k,dtype",
    [
        ("lut2_g64", 8192, 8192, torch.bfloat16),
        ("lut2_g128", 4096, 14336, torch.float16),
        ("lut1_g64", 4096, 4096, torch.bfloat16),
        ("int1_chan", 4100, 4096, torch.float16),
    ],
)
def test_codes_as_indices_of_sparse_products(name: str, n: int, k: int, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("chosen on compute capability 9.0 alone")
    weight = weight_of(name, n, k, dtype=dtype, tables=3 if "lut" in name else 1)
    assert decode.equal_indices(weight.device)
    route = _routes(weight.geometry, None, 1, weight.device)[0]
    assert route.name == "decode" and route.config.indices
    call, x = KERNEL._bind(weight, 1, (route,)), inputs(1, k, dtype)
    assert testing.check_product(lambda x, _, bias, out: call(x, bias, out), x, weight, None, route.rounds) is None
    columns, dense = torch.tensor([0, 1, 77, k - 1]), reference.dequantise(weight)
    for column, probe in zip(columns.tolist(), testing.one_hot_probe(k, columns, dtype, "cuda:0"), strict=True):
        out = testing.poisoned(1, n, dtype, "cuda:0")
        call(probe[None].contiguous(), None, out)
        assert torch.equal(out[0], dense[:, column])
    first, again = (testing.poisoned(1, n, dtype, "cuda:0") for _ in range(2))
    call(x, None, first)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda:0")
    for _ in range(200):
        again.fill_(float("nan"))
        call(x, None, again)
        wrong += (again != first).any()
    assert int(wrong) == 0


def test_streaming_floor_writes_every_output() -> None:
    out = testing.poisoned(1, 5000, torch.bfloat16, "cuda:0")
    stream_floor(torch.zeros(1 << 22, dtype=torch.uint8, device="cuda:0"), out)
    assert torch.equal(out, torch.zeros_like(out))
