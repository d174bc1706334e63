"""The op: schema checks, fullgraph compile, export, gradients, shapes, the out variant, and refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fdk
from fdk import ops, reference, testing
from fdk.weight import encode_spec, from_spec

FORMATS = ("lut4_g64", "lut1_chan", "int3_g32", "uint4_g64", "nf4_g64")


def make(name: str = "lut4_g64", n: int = 48, k: int = 128, dtype: torch.dtype = torch.bfloat16):
    weight = testing.random_weight(fdk.parse(name), n, k, dtype)
    return weight, fdk.nn.Linear(weight, torch.randn(n).to(dtype))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("prepared", [False, True])
def test_opcheck(name: str, prepared: bool) -> None:
    weight, module = make(name)
    if prepared:
        ops.prepare(weight)
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    args = (x, list(weight.parts.values()), module.bias, encode_spec(weight), "auto")
    torch.library.opcheck(torch.ops.fdk.linear.default, args)
    out = torch.empty(3, 48, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.fdk.linear_out.default, (x.detach(), *args[1:], out))
    torch.library.opcheck(torch.ops.fdk.linear_grad.default, (torch.randn(3, 48).bfloat16(), args[1], args[3]))


@pytest.mark.parametrize("name", FORMATS)
def test_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    _, module = make(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for shape in ((128,), (1, 128), (2, 5, 128)):
        x = torch.randn(*shape).bfloat16()
        with torch.no_grad():
            assert torch.equal(compiled(x), module(x))
    x = torch.randn(4, 128).bfloat16().requires_grad_()
    compiled(x).float().sum().backward()
    assert x.grad is not None


def test_exports() -> None:
    _, module = make()
    x = torch.randn(3, 128).bfloat16()
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("m")}})
        for m in (3, 7):
            x = torch.randn(m, 128).bfloat16()
            assert torch.equal(program.module()(x), module(x))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_flows_to_the_input_and_bias(name: str, dtype: torch.dtype) -> None:
    weight, module = make(name, dtype=dtype)
    module.bias.requires_grad_(True)
    x = torch.randn(2, 3, 128, dtype=dtype).requires_grad_()
    grad = torch.randn(2, 3, 48, dtype=dtype)
    module(x).backward(grad)
    expected = grad.double() @ reference.dequantise(weight, torch.float64)
    scale = expected.norm() / expected.numel() ** 0.5
    tolerance = 8 * testing.UNIT_ROUNDOFF[dtype]
    assert ((x.grad.double() - expected).abs() <= tolerance * (scale * 6 + expected.abs())).all()
    assert torch.allclose(module.bias.grad.double(), grad.double().sum((0, 1)), rtol=tolerance, atol=tolerance * 8)


@pytest.mark.filterwarnings("ignore:Input #0 requires gradient")
def test_gradcheck_in_float32_by_finite_differences() -> None:
    weight, _ = make("int4_g32", n=8, k=32, dtype=torch.float32)
    x = torch.randn(2, 32, requires_grad=True)
    torch.autograd.gradcheck(
        lambda x: fdk.linear(x, weight), (x,), eps=0.25, atol=1e-2, rtol=1e-3, nondet_tol=0, check_forward_ad=False
    )


def test_shapes_of_every_rank_and_stride() -> None:
    weight, module = make()
    dense = reference.dequantise(weight, torch.float64)
    for x in (
        torch.randn(128).bfloat16(),
        torch.randn(0, 128).bfloat16(),
        torch.randn(2, 0, 128).bfloat16(),
        torch.randn(2, 3, 4, 128).bfloat16(),
        torch.randn(128, 6).bfloat16().T,
        torch.randn(6, 256).bfloat16()[:, ::2],
        torch.randn(7, 128).bfloat16()[::2],
        torch.randn(1, 129).bfloat16()[:, 1:],
    ):
        y = module(x)
        assert y.shape == (*x.shape[:-1], 48)
        expected = x.double() @ dense.T + module.bias.double()
        assert torch.allclose(y.double(), expected, rtol=2**-7, atol=1e-3)


def test_out_variant_writes_a_strided_output() -> None:
    weight, _ = make()
    x = torch.randn(5, 128).bfloat16()
    out = torch.full((5, 96), torch.nan, dtype=torch.bfloat16)[:, ::2]
    torch.ops.fdk.linear_out(x, list(weight.parts.values()), None, encode_spec(weight), "auto", out)
    assert torch.equal(out, fdk.linear(x, weight))


def test_spec_describes_the_weight() -> None:
    for name in FORMATS:
        weight, _ = make(name)
        again = from_spec(encode_spec(weight), list(weight.parts.values()))
        assert again.geometry == weight.geometry and again.parts.keys() == weight.parts.keys()


def test_module_survives_copy_cast_and_state_dict() -> None:
    weight, module = make()
    original = reference.dequantise(weight)
    x = torch.randn(3, 128).bfloat16()
    expected = module(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), expected)
    assert torch.equal(module.float()(x.float()).bfloat16(), expected)
    module.to(torch.bfloat16)
    assert torch.equal(fdk.dequantise(module.weight), original)
    state = module.state_dict()
    assert set(state) == {"codes", "scales", "table", "bias"}
    empty = fdk.nn.Linear.empty(weight.geometry, bias=True)
    with pytest.raises(RuntimeError, match="codes"):
        empty.load_state_dict({key: value for key, value in state.items() if key != "codes"})
    empty.load_state_dict(state)
    for other in (make("lut3_g64")[1], make(n=32)[1]):
        with pytest.raises(RuntimeError, match=r"codes is \[48, 64\], but .* layer .*; load the matching"):
            other.load_state_dict(state)
    assert torch.equal(empty(x), expected)


def test_explain_names_the_kernel_and_the_reasons() -> None:
    weight, _ = make()
    assert "copied" in str(fdk.explain(torch.randn(128, 3).bfloat16().T, weight))
    text = str(fdk.explain(torch.randn(1, 128).bfloat16(), weight))
    assert "copied" not in text
    assert "lut4_g64 [48, 128]" in text and "chosen" in text and "reference" in text


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.randn(3, 64).bfloat16(), None, r"x has shape \[3, 64\]"),
        (torch.randn(3, 128), None, r"x is torch.float32.*weight.to\(dtype"),
        (torch.randn(3, 128, device="meta").bfloat16(), None, "x lies on meta"),
        (torch.randn(3, 128).bfloat16(), torch.randn(47).bfloat16(), r"bias must be .* \[48\]"),
        (torch.randn(3, 128).bfloat16(), torch.randn(48), "bias must be torch.bfloat16"),
        (torch.tensor(1.0).bfloat16(), None, "x has shape"),
    ],
)
def test_refusals_say_what_is_wrong(x, bias, message: str) -> None:
    weight, _ = make()
    with torch.no_grad(), pytest.raises(fdk.FormatError, match=message):
        fdk.linear(x, weight, bias)


def test_operands_without_numbers_are_checked_too() -> None:
    _, module = make()
    with pytest.raises(fdk.FormatError, match="x lies on meta, but the weight on cpu"):
        module(torch.empty(2, 128, dtype=torch.bfloat16, device="meta"))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(fdk.FormatError, match=r"x has shape \[2, 127\]"):
        module(torch.empty(2, 127, dtype=torch.bfloat16))


def test_unknown_or_unable_kernel_is_refused() -> None:
    weight, _ = make()
    x = torch.randn(1, 128).bfloat16()
    with pytest.raises(fdk.UnsupportedError, match="unknown kernel 'warp'"):
        fdk.linear(x, weight, kernel="warp")


def test_nothing_that_records_or_fakes_ops_is_bypassed() -> None:
    weight, module = make()
    x = torch.randn(3, 128).bfloat16()
    expected = module(x)
    with torch.no_grad():
        for function in (module, lambda x: fdk.linear(x, weight, module.bias)):
            graph = make_fx(function)(x)
            assert "fdk.linear" in graph.code
            assert torch.equal(graph(x), expected)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fake = function(mode.from_tensor(x))
                assert isinstance(fake, FakeTensor) and fake.shape == expected.shape
            assert torch.equal(torch.jit.trace(function, (x,), check_trace=False)(-x), function(-x))


def test_tensors_put_in_the_place_of_a_modules_own_are_used() -> None:
    _, module = make()
    other = fdk.nn.Linear(testing.random_weight(fdk.parse("lut4_g64"), 48, 128, torch.bfloat16, seed=7))
    x = torch.randn(3, 128).bfloat16()
    with torch.no_grad():
        swapped = torch.func.functional_call(
            module, {**dict(other.named_buffers()), "bias": torch.zeros(48).bfloat16()}, x
        )
        assert torch.equal(swapped, other(x)) and not torch.equal(swapped, module(x))


def test_a_bias_is_trained_whether_or_not_x_needs_a_gradient() -> None:
    _, module = make()
    module.bias.requires_grad_(True)
    module(torch.randn(3, 128).bfloat16()).sum().backward()
    assert torch.equal(module.bias.grad, torch.full((48,), 3.0).bfloat16())


def test_second_gradient_is_that_of_the_dense_weight() -> None:
    weight, module = make(dtype=torch.float32)
    dense = reference.dequantise(weight)
    x = torch.randn(3, 128, requires_grad=True)

    def second(product):
        (first,) = torch.autograd.grad(product(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    expected = second(lambda x: torch.nn.functional.linear(x, dense, module.bias))
    # Sums of 128 and of 48 float32 terms, three times over, each to a relative 2^-24 of the largest.
    assert (second(module) - expected).abs().max() <= 2**-24 * 3 * 176 * expected.abs().max()


def test_autocast_brings_x_to_the_weights_dtype() -> None:
    weight, module = make()
    x = torch.randn(3, 128)
    for product in (module, lambda x: fdk.linear(x, weight, module.bias)):
        with torch.no_grad():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = product(x)
            assert torch.equal(y, product(x.bfloat16()))
            with pytest.raises(fdk.FormatError, match="x is torch.float32"):
                product(x)


def test_what_is_not_a_weight_is_refused_by_name() -> None:
    _, module = make()
    x = torch.randn(3, 128).bfloat16()
    for call in (lambda w: fdk.linear(x, w), fdk.dequantise, lambda w: fdk.explain(x, w)):
        with pytest.raises(fdk.FormatError, match="weight is a Linear, not a QuantisedWeight; give its .weight"):
            call(module)
        with pytest.raises(
            fdk.FormatError, match=r"weight is a torch.float32 tensor \[48, 128\], not a QuantisedWeight; quantise it"
        ):
            call(torch.zeros(48, 128))
