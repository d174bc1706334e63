"""What the plugin makes of a config and of the settings of a run: choices and refusals, without an engine."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import fdk
from fdk import testing
from fdk.integrations.vllm.sources import Dense, Place

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; `make test-vllm` sets it up")

N, K = 12, 128
PLACE = Place(0, 1, N, K)
RUN = {"load_config": None, "compilation_config": None}
MESSAGES = {
    "another key": ({"precison": 4}, r"unknown key 'precison'; known: .*precision"),
    "no object": (4, r"additional_config\['fdk'\] = 4 is not an object of settings"),
    "a format for a low-bit folder": (
        {"format": "lut4_g64"},
        "asks for format, but .* quantised already; only precision",
    ),
    "a width that does not exist": ({"precision": 9}, "0.v_proj: a slice of 9 bits of nest8 .* choose one of 2, 3"),
    "a layer that does not exist": (
        {"precision": {"up": 4}},
        "precision 'up' matches no nested layer; .* called 0.v_proj",
    ),
    "a layer that is not nested": ({"precision": {"q_proj": 4}}, "precision 'q_proj' matches no nested layer"),
    "a file that does not exist": ({"precision": "widths.txt"}, "cannot read the overrides in widths.txt"),
    "a list": ({"precision": [4]}, r"\['precision'\] = \[4\] is neither bits, nor .* nor the name of a file"),
}


@pytest.fixture
def config(monkeypatch):
    """config(settings, layers or None) -> the method's config, its settings read."""
    from fdk.integrations.vllm import config as module

    def make(settings, layers: dict[str, dict] | None):
        monkeypatch.setattr(
            module.vllm, "current_config", lambda: SimpleNamespace(additional_config={"fdk": settings}, **RUN)
        )
        made = module.FdkConfig(layers)
        assert made.get_quant_method(torch.nn.Identity(), "0") is None
        return made

    return make


def entries(**formats: str) -> dict[str, dict]:
    return {f"0.{name}": {"format": fmt, "shape": [N, K]} for name, fmt in formats.items()}


@pytest.mark.parametrize("case", MESSAGES)
def test_settings_that_cannot_be_meant(config, case) -> None:
    settings, message = MESSAGES[case]
    with pytest.raises(fdk.FormatError, match=message):
        config(settings, entries(q_proj="lut4_g32", v_proj="nest8_g32"))


def test_a_precision_for_a_folder_without_nested_layers(config) -> None:
    with pytest.raises(fdk.FormatError, match="no nested layer; quantise it to a nested format"):
        config({"precision": 4}, entries(q_proj="lut4_g32"))


def test_a_16_bit_checkpoint_needs_a_format(config) -> None:
    with pytest.raises(fdk.FormatError, match="nothing says how it should be; give --additional-config"):
        config({}, None)
    with pytest.raises(fdk.FormatError, match="hexa"):
        config({"format": "hexa4_g32"}, None)
    made = config({"format": "nest8_g32", "precision": {"q": 3}, "skip": "o_proj"}, None)
    served = {name: made.source(name, PLACE, torch.bfloat16, torch.device("cpu")) for name in ("q", "k", "o_proj")}
    assert str(served["q"].recipe.format) == "nest8s3_g32" and str(served["k"].recipe.format) == "nest8_g32"
    assert isinstance(served["o_proj"], Dense)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": "hexa4_g32"}, "layer '0.q_proj': unknown format kind 'hexa'.* pip install -U fused-deq"),
        ({"shape": [N]}, "layer '0.q_proj' is not readable: .* copy the folder again"),
        ({"same_as": "0.k_proj"}, "0.q_proj shares its tensors with 0.k_proj, which vLLM's loader cannot express"),
    ],
)
def test_layers_that_cannot_be_read(config, changed, message) -> None:
    layers = entries(q_proj="lut4_g32", v_proj="nest8_g32")
    layers["0.q_proj"] |= changed
    made = config({"precision": 4}, layers)
    with pytest.raises(fdk.FdkError, match=message):
        made.source("0.q_proj", PLACE, torch.bfloat16, torch.device("cpu"))
    assert str(made.source("0.v_proj", PLACE, torch.bfloat16, torch.device("cpu")).geometry.format) == "nest8s4_g32"


def test_a_matgptq_folder_of_other_codes() -> None:
    from fdk.integrations.vllm.config import MatGPTQConfig

    with pytest.raises(fdk.UnsupportedError, match="master_bitwidth is 6, but fdk serves nested codes of 8 bits"):
        MatGPTQConfig.from_config({"master_bitwidth": 6})


@pytest.mark.parametrize("formats", [("lut4_g32", "lut4_g32"), ("lut4_g32", "int4_g32")], ids=["one", "two"])
def test_vllm_can_ask_a_layer_for_its_dense_weight(config, formats) -> None:
    """As it does for attention with latent heads."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

    from fdk.integrations.vllm.linear import FdkLinearMethod

    names = ["0.q_proj", "0.k_proj"]
    weights = [testing.random_weight(fdk.parse(fmt), N, K) for fmt in formats]
    made = config(
        {}, {name: {"format": str(w.format), "shape": [N, K]} for name, w in zip(names, weights, strict=True)}
    )
    layer, method = torch.nn.Module(), FdkLinearMethod(made, names)
    layer.tp_size, layer.tp_rank, layer.input_size_per_partition, layer.quant_method = 1, 0, K, method
    method.create_weights(layer, K, [N, N], K, 2 * N, torch.bfloat16)
    for shard, weight in enumerate(weights):
        for part, tensor in weight.parts.items():
            getattr(layer, part).weight_loader(getattr(layer, part), tensor, shard)
    method.process_weights_after_loading(layer)
    assert len(layer.fdk_products) == len(set(formats)) and layer.weight.numel() == 0
    dense = get_and_maybe_dequant_weights(layer, torch.bfloat16)
    assert torch.equal(dense, torch.cat([fdk.dequantise(weight) for weight in weights]))
