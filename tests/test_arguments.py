"""Arguments as users get them wrong: every public function names the argument and the remedy, by an error of fdk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fdk
from fdk import quantise
from fdk.errors import FdkError
from fdk.importers.int4matmul import from_int4matmul
from fdk.importers.marlin import from_marlin
from fdk.importers.source_lut import from_source

BF16 = torch.bfloat16
DENSE = torch.linspace(-1, 1, 32 * 64).reshape(32, 64).to(BF16)
X = torch.ones(2, 64, dtype=BF16)

WRONG = [
    *(None, 3, -1, 2.5, True, float("nan"), 10**30, "abc", "", b"x", object(), int, Path("/nowhere")),
    *([1.0, 2.0], (1, 2), [], {}, {"a": 1}, {3: 4}, {1, 2}, [None], ["a"]),
    *(np.zeros((2, 64), np.float32), np.float32(3), np.int64(4), np.array([1, 2])),
    *(torch.zeros(()), torch.zeros(0), torch.zeros(2, 64), torch.zeros(2, 63, dtype=BF16), nn.Parameter(DENSE[:2])),
    *(torch.zeros(2, 64, dtype=torch.int64), torch.zeros(2, 64, dtype=torch.bool), torch.zeros(2, 64).to_sparse()),
    *(torch.zeros(2, 64, device="meta"), torch.zeros(2, 64, dtype=torch.complex64)),
    *(torch.float64, torch.int8, "cuda:9", "tpu", torch.device("cpu"), "lut9_g64", fdk.parse("int4_g64")),
    *(nn.Linear(64, 32), nn.ReLU()),
]  # fmt: skip


def weight(name: str = "lut4_g64") -> fdk.QuantisedWeight:
    return fdk.QuantisedWeight.from_parts(name, 64, quantise.quantise(DENSE, name))


def layer(name: str = "lut4_g64") -> fdk.nn.Linear:
    return fdk.nn.Linear(weight(name))


def part(name: str, tensor: object, format: str = "uint4_g64") -> fdk.QuantisedWeight:
    return fdk.QuantisedWeight.from_parts(format, 64, {**quantise.quantise(DENSE, format), name: tensor})


def one_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32))


# By function and argument: the call with a value of that argument.
CALLS = {
    "linear-x": lambda v: fdk.linear(v, weight()),
    "linear-weight": lambda v: fdk.linear(X, v),
    "linear-bias": lambda v: fdk.linear(X, weight(), v),
    "linear-kernel": lambda v: fdk.linear(X, weight(), kernel=v),
    "explain-x": lambda v: fdk.explain(v, weight()),
    "explain-weight": lambda v: fdk.explain(X, v),
    "explain-kernel": lambda v: fdk.explain(X, weight(), v),
    "dequantise-weight": fdk.dequantise,
    "dequantise-dtype": lambda v: fdk.dequantise(weight(), v),
    "parse-format": fdk.parse,
    "quantise-weight": lambda v: quantise.quantise(v, "lut4_g64"),
    "quantise-format": lambda v: quantise.quantise(DENSE, v),
    "quantise-scales": lambda v: quantise.quantise(DENSE, "lut4_g64", dtype=v),
    "quantise-table": lambda v: quantise.quantise(DENSE, "lut4_g64", codebook=v),
    "quantise-scale": lambda v: quantise.quantise(DENSE, "lut4_g64", scale=v),
    "quantise-arithmetic": lambda v: quantise.quantise(DENSE, "lut4_g64", arithmetic=v),
    "quantise-keep": lambda v: quantise.quantise(DENSE, "lut4_g64_sp16of32", keep=v),
    "nested-widths": lambda v: quantise.quantise_nested(DENSE, "nest8_g64", widths=v),
    "nested-hessian": lambda v: quantise.quantise_nested(DENSE, "nest8_g64", hessian=v),
    "weight-geometry": lambda v: fdk.QuantisedWeight(v, weight().parts),
    "weight-parts": lambda v: fdk.QuantisedWeight(weight().geometry, v),
    "from_parts-k": lambda v: fdk.QuantisedWeight.from_parts("lut4_chan", v, quantise.quantise(DENSE, "lut4_chan")),
    "from_parts-parts": lambda v: fdk.QuantisedWeight.from_parts("lut4_g64", 64, v),
    "from_parts-row_ends": lambda v: fdk.QuantisedWeight.from_parts(
        "lut4_g64", 64, quantise.quantise(DENSE, "lut4_g64"), v
    ),
    "from_parts-codes": lambda v: part("codes", v),
    "from_parts-scales": lambda v: part("scales", v),
    "from_parts-zeros": lambda v: part("zeros", v),
    "from_parts-table": lambda v: part("table", v, "lut4_g64"),
    "at-bits": lambda v: weight("nest8_g64").at(v),
    "shard-rank": lambda v: weight().shard(0, v, 2),
    "cut-dim": lambda v: weight().cut(v, 0, 2),
    "cut-rows": lambda v: weight().cut(0, 0, v),
    "to-device": lambda v: weight().to(v),
    "to-dtype": lambda v: weight().to(dtype=v),
    "to_layout-layout": lambda v: weight().to_layout(v),
    "concat-weights": fdk.concat,
    "concat-dim": lambda v: fdk.concat([weight()], v),
    "format-kind": lambda v: fdk.Format(v, 4, 64),
    "format-group": lambda v: fdk.Format(fdk.parse("lut4_g64").kind, 4, v),
    "module-weight": fdk.nn.Linear,
    "module-bias": lambda v: fdk.nn.Linear(weight(), v),
    "module-x": lambda v: layer()(v),
    "module-bits": lambda v: layer("nest8_g64").set_precision(v),
    "from_linear-linear": lambda v: fdk.from_linear(v, "lut4_g64"),
    "from_linear-config": lambda v: fdk.from_linear(nn.Linear(64, 32), v),
    "quantise_-model": lambda v: fdk.quantise_(v, "lut4_g64"),
    "quantise_-config": lambda v: fdk.quantise_(one_layer(), v),
    "models-source": lambda v: fdk.models.quantise(v, "lut4_g64"),
    "models-dtype": lambda v: fdk.models.quantise(one_layer(), "lut4_g64", dtype=v),
    "models-device": lambda v: fdk.models.quantise(one_layer(), "lut4_g64", v),
    "models-lut": lambda v: fdk.models.quantise(one_layer(), "lut4_g64", lut=v),
    "folder-model": lambda v: fdk.models.quantise_folder(v, "new", "lut4_g64"),
    "folder-target": lambda v: fdk.models.quantise_folder("source", v, "lut4_g64"),
    "save-model": lambda v: fdk.save(v, "never"),
    "save-path": lambda v: fdk.save(nn.ReLU(), v),
    "load-path": fdk.load,
    "load-model": lambda v: fdk.load("nowhere", model=v),
    "set_precision-model": lambda v: fdk.set_precision(v, 4),
    "set_precision-precision": lambda v: fdk.set_precision(layer("nest8_g64"), v),
    "warmup-model": fdk.warmup,
    "warmup-batch_sizes": lambda v: fdk.warmup(layer(), v),
    "config-bits": lambda v: fdk.models.QuantisationConfig(v),
    "config-block_size": lambda v: fdk.models.QuantisationConfig(4, v),
    "config-codebook": lambda v: fdk.models.QuantisationConfig(4, codebook=v),
    "config-overrides": lambda v: fdk.models.QuantisationConfig(4, overrides=v),
    "config-dtype": lambda v: fdk.models.QuantisationConfig(4, dtype=v),
    "config-skip": lambda v: fdk.models.QuantisationConfig(4, skip=v),
    "source_lut-weight_data": lambda v: from_source(v, torch.ones(32, 1), torch.arange(16.0)),
    "int4matmul-qweight": lambda v: from_int4matmul(4, v, torch.ones(1, 32), torch.ones(1, 32)),
    "marlin-B": lambda v: from_marlin(v, torch.ones(1, 64)),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_argument_is_refused_by_an_error_of_fdk(case: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = 0
    for value in WRONG:
        try:
            CALLS[case](value)
        except FdkError as error:
            refused += 1
            assert len(str(error)) > 20 and "\n" not in str(error)
            assert len(str(error)) < 400, error
    assert refused > len(WRONG) // 2 and not os.listdir(tmp_path)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1.0], r"x is a list, not a torch.Tensor; give torch.tensor\(...\)"),
        (np.zeros((2, 64)), r"x is a numpy.ndarray, not a torch.Tensor; give torch.as_tensor\(...\)"),
        (None, "x is None, not a torch.Tensor; give a tensor"),
        ("abc", "x is 'abc', not a torch.Tensor; give a tensor"),
    ],
)
def test_what_is_no_tensor_is_named(value, text: str, grad: bool) -> None:
    module = layer()
    with torch.set_grad_enabled(grad):
        for product in (module, lambda x: fdk.linear(x, module.weight), lambda x: fdk.explain(x, module.weight)):
            with pytest.raises(fdk.FormatError, match=text):
                product(value)
        if value is not None:
            with pytest.raises(fdk.FormatError, match=text.replace("x is", "bias is", 1)):
                fdk.linear(X, module.weight, value)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: fdk.load(nn.ReLU()), "path is a ReLU, not a path; give a str or a pathlib.Path"),
        (lambda: fdk.warmup(layer(), 8), r"batch_sizes is 8, not a sequence of whole numbers; give such as \(1, 8\)"),
        (lambda: fdk.linear(X, weight().parts), "weight is a dict, not a QuantisedWeight; quantise it"),
        (lambda: fdk.linear(X, weight(), kernel=["cpu"]), "unknown kernel a list; choose auto or one of cpu"),
        (lambda: fdk.Format("lut", 4, 64), "kind is 'lut', not a fdk.formats.Kind; use fdk.parse"),
        (lambda: fdk.concat(weight()), "weights is a QuantisedWeight; give a list of at least one QuantisedWeight"),
        (lambda: fdk.nn.Linear(weight(), torch.zeros(31, dtype=BF16)), r"bias has shape \[31\], but .* needs \[32\]"),
        (lambda: part("scales", torch.ones(32)), r"scales must be \[n, groups\], not \[32\]"),
        (lambda: fdk.quantise_(one_layer(), "lut4_g64", "lm_head"), "filter_fn is 'lm_head', which cannot be called"),
    ],
)
def test_likely_mistakes_and_what_is_said(call, text: str) -> None:
    with pytest.raises(FdkError, match=text):
        call()


def test_a_state_dict_of_something_else_is_refused_by_name() -> None:
    module = layer()
    state = module.state_dict()
    for value, text in (
        (state["codes"].numpy(), "codes is a numpy.ndarray, not a torch.Tensor"),
        (state["codes"].to_sparse(), "codes has layout torch.sparse_coo"),
        (state["codes"].to("meta"), "codes lies on the meta device"),
    ):
        with pytest.raises(RuntimeError, match=text):
            module.load_state_dict({**state, "codes": value})


def test_whole_numbers_of_numpy_and_torch_are_taken() -> None:
    nested = weight("nest8_g64")
    assert nested.at(np.int64(4)).format == nested.at(torch.tensor(4)).format == fdk.parse("nest8s4_g64")
    assert fdk.warmup(layer(), np.array([1, 2])) == 2
