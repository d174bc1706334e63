"""fdk.models.quantise: the source untouched, every kind of layer handled or named."""

import copy

import pytest
import torch
from torch import nn

import fdk
from fdk import reference
from fdk.models import QuantisationConfig, quantise


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_snippet_of_the_interface_runs():
    ref, device, dtype = nn.Linear(128, 64), "cpu", torch.bfloat16
    x = torch.randn(3, 128, dtype=dtype)
    config = fdk.models.QuantisationConfig(bits=4, block_size=64)
    m = fdk.models.quantise(ref, config, device=device, dtype=dtype)
    y = m(x)
    expected = x.double() @ reference.dequantise(m.weight, torch.float64).T + m.bias.double()
    assert y.shape == (3, 64)
    assert y.dtype == dtype
    # One rounding to bfloat16 of the result, and one where a kernel rounds scaled weights.
    assert (y.double() - expected).norm() <= 2.0**-7 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_source_stays_and_the_copy_shares_nothing(llama, tokens, dtype):
    before = state(llama)
    model = quantise(llama, QuantisationConfig(bits=4), dtype=dtype)
    assert same(before, state(llama))
    assert not {t.data_ptr() for t in llama.state_dict().values()} & {t.data_ptr() for t in model.state_dict().values()}
    assert isinstance(model.model.layers[0].mlp.up_proj, fdk.nn.Linear)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight.dtype == dtype
    assert model(tokens).dtype == dtype
    assert not model.training


def test_bfloat16_is_the_default_and_the_config_can_say_otherwise(mlp):
    assert quantise(mlp, "lut4_g64")[0].weight.dtype == torch.bfloat16
    assert quantise(mlp, QuantisationConfig(bits=4, dtype="fp16"))[0].weight.dtype == torch.float16
    assert quantise(mlp, QuantisationConfig(bits=4, dtype="fp16"), dtype=torch.float32)[0].weight.dtype == torch.float32


def test_none_only_casts(llama):
    model = quantise(llama, None, dtype=torch.float16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, llama.state_dict()[name].half())
    assert model.fdk_report.layers == []


def test_computed_buffers_keep_their_precision():
    module = nn.Module()
    module.register_buffer("frequencies", torch.rand(3), persistent=False)
    module.register_buffer("running", torch.rand(3))
    module.register_buffer("count", torch.arange(3))
    copied = quantise(module, None)
    assert copied.frequencies.dtype == torch.float32
    assert copied.running.dtype == torch.bfloat16
    assert copied.count.dtype == torch.int64


def test_the_copy_equals_layers_converted_one_by_one(mlp):
    config = QuantisationConfig(bits=3, block_size=32, codebook="kmeans")
    model = quantise(mlp, config)
    for index in (0, 2):
        alone = fdk.quantise.quantise(mlp[index].weight, "lut3_g32", dtype=torch.bfloat16, codebook="kmeans")
        parts = model[index].weight.canonical().parts
        assert all(torch.equal(parts[name], alone[name]) for name in alone)
        if mlp[index].bias is not None:
            assert torch.equal(model[index].bias, mlp[index].bias.bfloat16())


def test_lut_reaches_every_layer(llama):
    table = torch.tensor([-1.0, -0.25, 0.25, 1.0])
    model = quantise(llama, QuantisationConfig(bits=2, overrides={"down_proj": 3}), lut=table)
    layers = [module for module in model.modules() if isinstance(module, fdk.nn.Linear)]
    assert len(layers) == 14
    for layer in layers:
        stored = layer.weight.canonical().parts["table"][0]
        assert stored[:4].tolist() == table.tolist()
        assert set(stored[4:].tolist()) <= {1.0}


def test_lut_that_cannot_be_used_is_refused(mlp):
    with pytest.raises(fdk.FormatError, match="int4_g64 defines its own values"):
        quantise(mlp, "int4_g64", lut=torch.ones(16))
    with pytest.raises(fdk.FormatError, match=r"2 bits.*1 to 4 values"):
        quantise(mlp, "lut2_g64", lut=torch.ones(5))
    with pytest.raises(fdk.FormatError, match="config=None only casts"):
        quantise(mlp, None, lut=torch.ones(5))


def test_marlin_semantics():
    linear = nn.Linear(128, 32, bias=False)
    marlin = quantise(linear, QuantisationConfig(bits=4, kernel="marlin"), dtype=torch.float32).weight
    weight = marlin.canonical()
    scale = weight.parts["scales"].repeat_interleave(64, 1)
    codes = fdk.packing.unpack_codes(weight.parts["codes"], 4, 128)
    assert torch.equal(codes.float(), (linear.weight.detach() / scale).round().add(8).clamp(0, 15))
    assert torch.equal(fdk.dequantise(weight), (codes.float() - 8) * scale)
    table = quantise(linear, QuantisationConfig(bits=4, kernel="marlin-lut"), dtype=torch.float32).weight
    assert str(table.format) == "lut4_g64"
    assert torch.equal(fdk.dequantise(table), fdk.dequantise(weight))


class Plain(nn.Linear):
    """A subclass that computes what Linear does."""


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses(mlp):
    model = nn.ModuleDict({"plain": Plain(64, 16), "scaled": Scaled(64, 16)})
    low = quantise(model, "lut4_g64")
    assert isinstance(low["plain"], fdk.nn.Linear)
    assert type(low["scaled"]) is Scaled
    assert "forward of its own" in low.fdk_report.kept["scaled"]


def test_attention_that_reads_its_weights_is_left_alone():
    model = nn.MultiheadAttention(64, 4)
    low = quantise(model, "lut4_g64", dtype=torch.float32)
    assert "MultiheadAttention" in low.fdk_report.kept["out_proj"]
    x = torch.randn(3, 1, 64)
    assert torch.equal(low(x, x, x)[0], model(x, x, x)[0])


def test_hooks_are_not_lost_in_silence():
    model = nn.Sequential(nn.Linear(64, 16))
    model[0].register_forward_hook(lambda *_: None)
    assert "hooks" in quantise(model, "lut4_g64").fdk_report.kept["0"]


def test_tied_linears_share_one_weight():
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(64, 32), "c": nn.Linear(64, 32)})
    model["b"].weight = model["a"].weight
    model["d"] = model["c"]
    low = quantise(model, "lut4_g64")
    assert low["a"].weight is low["b"].weight
    assert not torch.equal(low["a"].bias, low["b"].bias)
    assert low["c"] is low["d"]
    assert [(layer.name, layer.shared_with) for layer in low.fdk_report.layers] == [("a", ("b",)), ("c", ())]
    assert low.fdk_report.quantised == 2 * 64 * 32
    with pytest.raises(fdk.FormatError, match="b shares its weight with a, but one is to be lut2_g64"):
        quantise(model, QuantisationConfig(bits=4, overrides={"b": 2}))


def test_a_linear_tied_to_an_embedding_stays_dense_and_tied():
    model = nn.ModuleDict({"embed": nn.Embedding(32, 64), "head": nn.Linear(64, 32, bias=False)})
    model["head"].weight = model["embed"].weight
    low = quantise(model, "lut4_g64")
    assert low["head"].weight is low["embed"].weight
    assert "shared with embed.weight" in low.fdk_report.kept["head"]


def test_sizes_that_do_not_fit_are_refused_by_name_before_anything_is_done():
    model = nn.ModuleDict({"good": nn.Linear(128, 8), "odd": nn.Linear(100, 8), "other": nn.Linear(72, 8)})
    with pytest.raises(fdk.FormatError) as error:
        quantise(model, "lut4_g64")
    text = str(error.value)
    assert "odd [8, 100]: group 64 does not divide k = 100; use one scale per row (chan), or skip" in text
    assert "other [8, 72]" in text
    assert "good" not in text
    alike = nn.Sequential(*(nn.Linear(100, 8) for _ in range(6)))
    with pytest.raises(fdk.FormatError) as error:
        quantise(alike, "lut4_g64")
    assert str(error.value).endswith("so with 1 [8, 100], 2 [8, 100] and 3 more")
    low = quantise(model, QuantisationConfig(bits=4, overrides={"o": "lut4_chan"}))
    assert low["odd"](torch.randn(2, 100).bfloat16()).shape == (2, 8)


def test_devices_that_are_not_here_are_refused(mlp):
    low = quantise(mlp, "lut4_g64", device="cpu")
    for name, words in (
        ("gpu", "'gpu' is unknown"),
        ("xpu", "'xpu' is not supported"),
        ("cuda:99", "device 'cuda:99'"),
    ):
        with pytest.raises(fdk.UnsupportedError, match=words):
            quantise(mlp, "lut4_g64", device=name)
        with pytest.raises(fdk.UnsupportedError, match=words):
            low[0].weight.to(name)


def test_bad_weights_name_the_layer(mlp):
    with torch.no_grad():
        mlp[2].weight[3, 5] = float("nan")
    with pytest.raises(fdk.FormatError, match=r"^2\.weight\[3, 5\] is nan"):
        quantise(mlp, "lut4_g64")
    with pytest.raises(fdk.FormatError, match="meta device"), torch.device("meta"):
        quantise(nn.Sequential(nn.Linear(64, 8)), "lut4_g64")
    with pytest.raises(fdk.FormatError, match="float64"):
        quantise(mlp, "lut4_g64", dtype=torch.float64)
    with pytest.raises(fdk.FormatError, match="source is 'folder', not a torch.nn.Module"):
        quantise("folder", "lut4_g64")
    with pytest.raises(fdk.FormatError, match="'int4' is not a format name"):
        quantise(mlp, "int4")


def test_the_report(llama):
    model = quantise(llama, QuantisationConfig(bits=4))
    report = model.fdk_report
    assert len(report.layers) == 14
    assert report.kept == {"lm_head": "skipped by the configuration"}
    linear = sum(m.weight.numel() for n, m in llama.named_modules() if type(m) is nn.Linear and n != "lm_head")
    assert report.quantised == linear
    assert report.share == linear / sum(p.numel() for p in llama.parameters())
    first = report.layers[0]
    dense = llama.get_submodule(first.name).weight.double()
    error = dense - fdk.dequantise(model.get_submodule(first.name).weight, torch.float32).double()
    assert first.error.sqnr_db == pytest.approx(
        10 * torch.log10(dense.square().sum() / error.square().sum()).item(), rel=1e-5
    )
    assert first.error.max_abs_error == pytest.approx(error.abs().max().item(), rel=1e-5)
    assert first.error.bits_per_weight == 4 + 16 / 64 + 16 * 16 / dense.numel()
    assert "q_proj" in str(report)
    assert report.summary in str(report)


def test_a_deep_copy_and_a_second_pass_work(mlp):
    low = quantise(mlp, "lut4_g64")
    again = copy.deepcopy(low)
    x = torch.randn(2, 64).bfloat16()
    assert torch.equal(again(x), low(x))
    assert torch.equal(quantise(low, "lut2_g64")(x), low(x))


def test_memory_stays_at_one_dense_layer(monkeypatch):
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(6)))
    dense = [layer.weight.data_ptr() for layer in model]
    copied = []
    original = torch.Tensor.to

    def watch(tensor, *arguments, **keywords):
        if tensor.data_ptr() in dense and tensor.numel() == 256 * 256:
            copied.append(keywords.get("copy", False))
        return original(tensor, *arguments, **keywords)

    monkeypatch.setattr(torch.Tensor, "to", watch)
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", lambda *_: pytest.fail("a dense weight was copied"))
    quantise(model, "lut4_g64")
    assert not any(copied)
