"""warmup runs each layer once for every batch size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fdk
from fdk import testing


def model() -> nn.Module:
    layers = [fdk.nn.Linear(testing.random_weight(fdk.parse("lut4_g32"), 32, 32, seed=i)) for i in range(2)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def test_every_layer_runs_for_every_batch_size() -> None:
    seen = []
    net = model()
    for layer in net:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    assert fdk.warmup(net, (1, 8)) == 4
    assert seen == [(1, 32), (8, 32)] * 2
    assert fdk.warmup(nn.ReLU()) == 0


def test_bad_input_is_named() -> None:
    with pytest.raises(fdk.FormatError, match="batch_sizes holds -1"):
        fdk.warmup(model(), (1, -1))
    with pytest.raises(fdk.FormatError, match="0 lies on the meta device"):
        fdk.warmup(model().to("meta"), (1,))


@pytest.mark.gpu
def test_a_graph_can_be_captured_after_it() -> None:
    net = model().to("cuda")
    x = torch.randn(4, 32, device="cuda").bfloat16()
    fdk.warmup(net, (4,))
    expected = net(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = net(x)
    graph.replay()
    assert torch.equal(y, expected)
