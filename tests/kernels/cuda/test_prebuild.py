"""What is compiled ahead is what products load, for this GPU or one elsewhere. No compiler and no GPU needed."""

import pytest
import torch

from fdk import testing
from fdk.errors import UnsupportedError
from fdk.formats import parse
from fdk.kernels import cuda
from fdk.kernels.cuda import decode, decode_config, dense, jit, prebuild, prefill, spread
from fdk.kernels.cuda.prebuild import Product, Target
from fdk.packing.layouts import Geometry

TARGETS = [Target((9, 0), 132), Target((9, 0), 114), Target((8, 9), 58), Target((8, 0), 108), Target((10, 0), 148)]
FORMATS = [
    ("lut4_g64", 320, 1024, {"tables": 3}),
    ("int1_g64", 4096, 1024, {}),
    ("uint3_g32", 200, 992, {"float_zeros": True}),
    ("uint4_g64", 192, 512, {"dtype": torch.float16}),
    ("nest8s4_g64", 192, 1024, {}),
    ("int4_g128_sp16of32", 192, 1024, {}),
    ("int8_chan", 130, 1001, {}),
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("name,n,k,more", FORMATS, ids=[f[0] for f in FORMATS])
def test_what_products_load_is_what_is_compiled_ahead(monkeypatch, name, n, k, more, target: Target) -> None:
    loaded = []

    def plan(source):
        return lambda weight, *config: loaded.append(source(weight, *config))

    def shape_of(weight):
        return decode_config.shape_of(weight.geometry, weight.parts["zeros"].dtype if "zeros" in weight.parts else None)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "_device_facts", lambda index: target)
    prefill_source = prefill.source
    for module in (decode, prefill):
        source = module.source
        monkeypatch.setattr(
            module, "Plan", plan(lambda w, config, source=source: source(shape_of(w), config, target.capability))
        )
    monkeypatch.setattr(
        spread,
        "Plan",
        lambda w, config: loaded.extend(
            (
                spread.source(target.capability),
                prefill_source(spread.dense_shape(shape_of(w)), config, target.capability),
            )
        ),
    )
    monkeypatch.setattr(dense, "Plan", plan(lambda w: dense.source(dense.variant_of(shape_of(w)), target.capability)))
    weight = testing.random_weight(parse(name), n, k, **more)
    zeros = weight.parts["zeros"].dtype if "zeros" in weight.parts else None
    for m in (1, 7, 33, 64, 65, 130, 700):
        loaded.clear()
        weight.cache.clear()
        cuda.KERNEL.call(weight, m)
        ahead = prebuild.sources([Product(weight.geometry, zeros, m)], target)
        assert sorted(map(repr, loaded)) == sorted(map(repr, ahead)) and ahead, m


def test_a_kernel_of_several_products_is_one_source() -> None:
    geometry = testing.random_weight(parse("lut4_g64"), 256, 512).geometry
    few = prebuild.sources([Product(geometry, None, m) for m in (5, 6, 7, 8)], TARGETS[0])
    assert len(few) == 1 and few[0][0] == "decode.cuh" and few[0][2] == "sm_90a"


def test_what_a_device_is_asked_with_is_compiled_ahead_too() -> None:
    geometry = Geometry(parse("lut2_g64"), 8192, 8192, torch.bfloat16, (8192,))
    served, asked = prebuild.sources([Product(geometry, None, 1)], TARGETS[0])
    assert served[1]["FDK_INDICES"] == asked[1]["FDK_INDICES"] == 1
    assert (asked[1]["FDK_N"], asked[1]["FDK_K"]) == (64, 256)
    with torch.device("meta"):
        weight, x, product = decode._of_equal_indices()
    assert x.device == product.device == weight.device == torch.device("cpu")
    assert decode_config.shape_of(weight.geometry, None) == decode.ASKED[0]
    assert x.shape == (1, 256) and product.shape == (1, 64)


def test_what_the_kernels_do_not_serve_needs_none() -> None:
    for weight, m in (
        (testing.random_weight(parse("lut4_g64"), 64, 64, torch.float32), 1),
        (testing.random_weight(parse("lut4_g64"), 0, 64), 1),
        (testing.random_weight(parse("lut4_g64"), 64, 64), 0),
    ):
        assert prebuild.sources([Product(weight.geometry, None, m)], TARGETS[0]) == []


def test_targets_by_name() -> None:
    assert Target.of("sm_90a") == ((9, 0), 132)
    assert Target.of("sm_89", 58) == ((8, 9), 58)
    with pytest.raises(UnsupportedError, match="names no architecture"):
        Target.of("h100")


def test_a_cubin_is_found_under_the_same_name_on_any_machine(monkeypatch, tmp_path) -> None:
    # Key and file name: sources, macros, architecture, flags and the compiler's version, nothing of the machine.
    monkeypatch.setattr(jit, "compiler_version", lambda: (13, 0))
    monkeypatch.setattr(jit, "build", lambda *source: (repr(source).encode(), ""))
    geometry = testing.random_weight(parse("lut4_g64"), 256, 512).geometry
    sources = prebuild.sources([Product(geometry, None, m) for m in (1, 16, 300)], TARGETS[0])
    monkeypatch.setenv("FDK_CACHE_DIR", str(tmp_path / "built"))
    assert jit.compile_ahead(sources) == len(sources)
    (tmp_path / "built").rename(tmp_path / "elsewhere")
    monkeypatch.setenv("FDK_CACHE_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(jit, "build", lambda *source: pytest.fail(f"compiles {source}"))
    assert jit.missing(sources) == [] and jit.compile_ahead(sources) == 0
    assert [jit.cubin(*source) for source in sources] == [repr(source).encode() for source in sources]
