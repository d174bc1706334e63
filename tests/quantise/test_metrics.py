"""The per-layer error record."""

import pytest
import torch

from fdk.errors import FormatError
from fdk.formats import parse
from fdk.quantise import layer_error, metrics, quantise, sqnr_db


def test_layer_error(normal, dequantise, monkeypatch):
    weight = normal(32, 256)
    decoded = dequantise(quantise(weight, "lut4_g64"), "lut4_g64", 256)
    record = layer_error("model.up_proj", parse("lut4_g64"), weight, decoded)
    assert (record.name, record.format, record.shape) == ("model.up_proj", "lut4_g64", (32, 256))
    assert record.sqnr_db == sqnr_db(weight, decoded)
    assert record.max_abs_error == pytest.approx((decoded.float() - weight.float()).abs().max().item())
    assert record.bits_per_weight == 4 + 16 / 64 + 16 * 16 / (32 * 256)
    monkeypatch.setattr(metrics, "CHUNK", 512)
    assert layer_error("", parse("lut4_g64"), weight, decoded).sqnr_db == pytest.approx(record.sqnr_db, rel=1e-12)


def test_stored_bytes_override_the_estimate(normal):
    weight = normal(2, 64)
    assert layer_error("w", parse("uint4_g64"), weight, weight, stored_bytes=100).bits_per_weight == 800 / 128


def test_shapes_must_agree():
    with pytest.raises(FormatError, match=r"w has shape \[2, 3\].*\[3, 2\]"):
        layer_error("w", parse("lut4_g64"), torch.zeros(2, 3), torch.zeros(3, 2))
