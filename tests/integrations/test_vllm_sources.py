"""What the vLLM plugin reads of a checkpoint for each process, without vLLM: every format, shard and refusal."""

from __future__ import annotations

import sys

import pytest
import torch

import fdk
from fdk import reference, testing
from fdk.formats import all_formats
from fdk.importers.matgptq import to_matgptq
from fdk.integrations.vllm import register
from fdk.integrations.vllm.sources import Dense, MatGPTQ, Place, Quantising, Stored
from fdk.nn.convert import Recipe, quantise_weight
from fdk.packing.layouts import Geometry
from fdk.weight import QuantisedWeight

CPU = torch.device("cpu")
N, K = 12, 128


def read(source, parts: dict[str, torch.Tensor]) -> QuantisedWeight:
    for part, tensor in parts.items():
        source.load(part, tensor)
    return source.finish()


def whole(fmt, n: int = N, tables: int = 1) -> QuantisedWeight:
    return testing.random_weight(fmt, n, K, tables=tables if fmt.kind.table == "stored" else 1)


@pytest.mark.parametrize("fmt", all_formats((32, None)), ids=str)
def test_stored_shards_are_those_of_the_weight(fmt) -> None:
    weight = whole(fmt, tables=3)
    for rank in range(2):
        rows = Stored("q", weight.geometry, Place(rank, 2, N // 2, K), CPU)
        assert torch.equal(
            reference.dequantise(read(rows, weight.parts)), reference.dequantise(weight.shard(0, rank, 2))
        )
        columns = Stored("o", weight.geometry, Place(rank, 2, N, K // 2), CPU)
        got = read(columns, dict(reversed(weight.parts.items())))
        assert torch.equal(reference.dequantise(got), reference.dequantise(weight.shard(1, rank, 2)))


@pytest.mark.parametrize("codebook", ["uniform", "kmeans"])
@pytest.mark.parametrize("fmt", all_formats((32, None)), ids=str)
def test_a_shard_quantised_while_loading_is_the_shard_of_the_quantised_weight(fmt, codebook) -> None:
    if codebook == "kmeans" and fmt.kind.name != "lut":
        codebook = "uniform"
    dense = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(fmt, codebook=codebook)
    weight = quantise_weight(dense, recipe, dtype=torch.bfloat16)
    for rank in range(2):
        for dim, place in ((0, Place(rank, 2, N // 2, K)), (1, Place(rank, 2, N, K // 2))):
            got = read(Quantising("q", recipe, place, torch.bfloat16, CPU), {"weight": dense})
            assert torch.equal(reference.dequantise(got), reference.dequantise(weight.shard(dim, rank, 2)))


def test_heads_are_repeated_where_there_are_more_processes() -> None:
    weight = whole(fdk.parse("lut4_g32"))
    dense = reference.dequantise(weight)
    for rank, half in enumerate((0, 0, 1, 1)):
        got = read(Stored("k", weight.geometry, Place(rank, 4, N // 2, K), CPU), weight.parts)
        assert torch.equal(reference.dequantise(got), dense.chunk(2)[half])


def test_projections_of_one_tensor_are_cut_one_by_one() -> None:
    weight = whole(fdk.parse("lut4_g32"), 24, tables=5)
    dense = reference.dequantise(weight)
    for offset, total in ((0, 12), (12, 8), (20, 4)):
        for rank in range(2):
            place = Place(rank, 2, total // 2, K, offset, total)
            got = read(Stored("qkv", weight.geometry, place, CPU), weight.parts)
            assert torch.equal(reference.dequantise(got), dense[offset : offset + total].chunk(2)[rank])


def test_matgptq_codes_and_scales_in_any_order() -> None:
    weight = whole(fdk.parse("nest8_g32")).to(dtype=torch.float32)
    stored = to_matgptq(weight)
    parts = {"qweight": stored["qweight"], "scales": stored["scale"], "zeros": stored["zero"]}
    for order in (list(parts), list(reversed(parts))):
        source = MatGPTQ("q", 4, 32, Place(1, 2, N, K // 2), torch.float32, CPU)
        got = read(source, {part: parts[part] for part in order})
        assert str(got.format) == "nest8s4_g32"
        assert torch.equal(reference.dequantise(got), reference.dequantise(weight.at(4).shard(1, 1, 2)))
    with pytest.raises(fdk.UnsupportedError, match="q: zero holds 3"):
        source.load("zeros", torch.full((N, 4), 3))


def test_nothing_of_the_loader_is_kept() -> None:
    weight = whole(fdk.parse("uint4_g32"))
    got = read(Stored("q", weight.geometry, Place(0, 2, N // 2, K), CPU), weight.parts)
    dense = torch.randn(N, K)
    kept = read(Dense("q", Place(1, 2, N, K // 2), torch.float32, CPU), {"weight": dense})
    assert torch.equal(kept, dense[:, K // 2 :])
    for part in (*got.parts.values(), kept):
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


@pytest.mark.parametrize("fmt", all_formats((32, None)), ids=str)
def test_invented_weights_are_valid(fmt) -> None:
    geometry = Geometry(fmt, N, K, torch.bfloat16, (N,))
    source = Stored("q", geometry, Place(0, 1, N, K), CPU)
    source.invent()
    weight = source.finish()
    assert fdk.linear(torch.ones(1, K).bfloat16(), weight).isfinite().all()


def stored(name: str = "lut4_g32", place: Place | None = None, dtype: torch.dtype = torch.bfloat16) -> Stored:
    geometry = Geometry(fdk.parse(name), N, K, dtype, (N,))
    return Stored("model.layers.3.q_proj", geometry, place or Place(0, 1, N, K), CPU)


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("lut4_g128", Place(0, 2, N, K // 2), r"q_proj: k / 2 = 64 .* use 1 shard, or quantise with a group of 64"),
        ("lut4_g32", Place(0, 2, N, K // 4), "q_proj has 128 columns, but the model needs 32 for each of 2"),
        ("lut4_g32", Place(0, 2, 5, K), "q_proj has 12 rows, which are not shards of 5 rows for 2 processes"),
        ("lut4_g32", Place(0, 1, 16, K, rows=(0, 16)), "q_proj has 12 rows, but the model needs 16"),
    ],
)
def test_shards_that_do_not_exist_are_refused_before_anything_is_read(name, place, message) -> None:
    with pytest.raises(fdk.FormatError, match=message):
        stored(name, place)


def test_a_missing_part_is_named() -> None:
    weight = whole(fdk.parse("lut4_g32"))
    source = stored()
    for part in ("codes", "scales"):
        source.load(part, weight.parts[part])
    with pytest.raises(fdk.FormatError, match=r"no tensor model.layers.3.q_proj.table; copy the whole folder"):
        source.finish()
    with pytest.raises(fdk.FormatError, match=r"no tensor w.weight"):
        Dense("w", Place(0, 1, N, K), torch.float32, CPU).finish()


def test_parts_that_do_not_fit_are_refused() -> None:
    weight = whole(fdk.parse("lut4_g32"))
    with pytest.raises(fdk.FormatError, match=r"q_proj.table is \[2, 16\], but a lut4_g32 weight .* has \[1, 16\]"):
        stored().load("table", torch.zeros(2, 16).bfloat16())
    with pytest.raises(fdk.FormatError, match=r"q_proj.scales is float16, but the model runs in bfloat16"):
        stored().load("scales", weight.parts["scales"].half())
    exact = stored(dtype=torch.float32)
    got = read(exact, weight.parts)
    assert got.dtype == torch.float32
    assert torch.equal(reference.dequantise(got).bfloat16(), reference.dequantise(weight))
    broken = stored()
    for part, tensor in weight.parts.items():
        broken.load(part, tensor if part != "scales" else tensor * float("nan"))
    with pytest.raises(fdk.FormatError, match=r"model.layers.3.q_proj: scales\[0, 0\] = nan .* copy the folder again"):
        broken.finish()


def test_a_missing_interface_is_named_and_leaves_vllm_running(monkeypatch, caplog) -> None:
    package = sys.modules[register.__module__]
    for module in ("config", "interfaces", "linear"):
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{module}", raising=False)
        monkeypatch.delattr(package, module, raising=False)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.linear", None)
    register()
    assert "fdk is not available: vLLM" in caplog.text and "no module vllm.model_executor" in caplog.text
