"""from_linear and quantise_: one layer, or a model in place."""

import pytest
import torch
from torch import nn

import fdk
from fdk.models import QuantisationConfig


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32, bias=False))


def test_from_linear_leaves_its_source():
    linear = nn.Linear(64, 32)
    before = linear.weight.clone()
    low = fdk.from_linear(linear, QuantisationConfig(bits=4))
    assert torch.equal(linear.weight, before)
    assert low.weight.dtype == low.bias.dtype == torch.float32
    assert torch.equal(low.bias, linear.bias)
    assert low.bias.data_ptr() != linear.bias.data_ptr()
    assert low.error.sqnr_db > 15
    assert fdk.from_linear(linear.bfloat16(), "int8_g32").weight.dtype == torch.bfloat16


def test_from_linear_refuses_by_name():
    with pytest.raises(fdk.FormatError, match=r"proj cannot be replaced: a Conv1d is not"):
        fdk.from_linear(nn.Conv1d(1, 1, 1), "lut4_g64", name="proj")
    with pytest.raises(fdk.FormatError, match=r"proj.*group 64 does not divide k = 100"):
        fdk.from_linear(nn.Linear(100, 8), "lut4_g64", name="proj")
    with pytest.raises(fdk.FormatError, match="proj lies on the meta device"):
        fdk.from_linear(nn.Linear(64, 8, device="meta"), "lut4_g64", name="proj")
    with pytest.raises(fdk.FormatError, match="is not a configuration"):
        fdk.from_linear(nn.Linear(64, 8), 4)


def test_in_place_keeps_the_model_running_in_its_own_dtype():
    net, x = model(), torch.randn(2, 64)
    first = net[0]
    report = fdk.quantise_(net, "lut8_g64")
    assert isinstance(net[0], fdk.nn.Linear)
    assert net(x).dtype == torch.float32
    assert net.fdk_report is report
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert torch.is_tensor(first.weight)


def test_in_place_with_a_dtype_casts_the_model():
    net = model()
    fdk.quantise_(net, QuantisationConfig(bits=4, dtype="bf16"))
    assert net(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


def test_the_filter_sees_module_and_name():
    net, seen = model(), []
    report = fdk.quantise_(net, "lut4_g64", lambda module, name: seen.append((type(module), name)) or name == "2")
    assert seen == [(nn.Linear, "0"), (nn.Linear, "2")]
    assert type(net[0]) is nn.Linear
    assert report.kept == {"0": "skipped by the filter"}


def test_a_module_in_two_places_is_replaced_in_both():
    net = nn.ModuleDict({"a": nn.Linear(64, 64)})
    net["b"] = net["a"]
    fdk.quantise_(net, "lut4_g64")
    assert isinstance(net["a"], fdk.nn.Linear)
    assert net["b"] is net["a"]


def test_nothing_changes_if_one_layer_does_not_fit():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(40, 8))
    with pytest.raises(fdk.FormatError, match=r"1 \[8, 40\]"):
        fdk.quantise_(net, "lut4_g64")
    assert all(type(layer) is nn.Linear for layer in net)


def test_a_bare_linear_points_to_from_linear():
    with pytest.raises(fdk.FormatError, match="from_linear"):
        fdk.quantise_(nn.Linear(64, 8), "lut4_g64")


def test_progress_counts_layers():
    calls = []
    fdk.quantise_(model(), "lut4_g64", progress=lambda layer, done, total: calls.append((layer.name, done, total)))
    assert calls == [("0", 1, 2), ("2", 2, 2)]


def test_the_default_of_a_name_skips_the_head():
    net = nn.ModuleDict({"body": nn.Linear(64, 64), "lm_head": nn.Linear(64, 64)})
    assert list(fdk.quantise_(net, "lut4_g64").kept) == ["lm_head"]
