"""Every provider multiplies the same stored weight, or says why it cannot."""

import pytest
import torch

from fdk.bench import providers
from fdk.bench.gate import Gate
from fdk.bench.problems import DTYPES, Line, Selection, lines
from fdk.bench.run import GPU_PEERS

CPU = torch.device("cpu")
N, K = 64, 256

LINES = [
    *lines(Selection((16, 8, 4, 3, 2, 1)), 64),
    *lines(Selection((16, 4), dtype="fp16"), 128),
    *lines(Selection((4,), ("uint4_g64", "nf4_g64"), "fp32"), 64),
    *(line for line in lines(Selection((4,), cuda=True), 64) if line.provider in GPU_PEERS),
]


def test_all_providers_are_under_test():
    assert {line.provider for line in LINES} == set(providers.PROVIDERS)


@pytest.mark.parametrize(
    "line", LINES, ids=lambda line: f"{line.provider}-{line.family or 'dense'}-{line.format}-{line.dtype}"
)
def test_a_provider_passes_the_gate_or_gives_a_reason(line):
    source = providers.Source(line, N, K, CPU, seed=3)
    try:
        prepared = providers.prepare(line, source)
    except providers.Unavailable as error:
        assert line.provider in {"torch-int4pack"} | GPU_PEERS, f"{line} cannot run: {error}"
        pytest.skip(str(error))
    prepared.copy_to(3)
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(1)).to(DTYPES[line.dtype])
    gate = Gate(x, source.exact_rows, N)
    for m in (1, 4):
        for index in range(3):
            assert gate.check(lambda x, out, i=index: prepared.run(x, i, out), m, prepared.rounds(m)) is None
    assert prepared.weight_bytes > 0


def test_copies_share_no_memory():
    for line in lines(Selection((16, 4)), 64):
        try:
            prepared = providers.prepare(line, providers.Source(line, N, K, CPU, 0))
        except providers.Unavailable:
            continue
        prepared.copy_to(3)
        tensors = []
        for weight in prepared.weights:
            parts = getattr(weight, "parts", None) or (weight if isinstance(weight, tuple) else {"w": weight})
            tensors += [
                t for t in (parts.values() if isinstance(parts, dict) else parts) if isinstance(t, torch.Tensor)
            ]
        large = [t.data_ptr() for t in tensors if t.numel() > 64]
        assert len(large) == len(set(large)), line


@pytest.mark.parametrize(
    "line, n, k, reason",
    [
        (Line("torch-int4pack", "int", "int4_g16", "bf16"), 64, 256, "groups of 32, 64, 128, 256 only, not 16"),
        (Line("torch-int4pack", "int", "int4_g64", "bf16"), 40, 256, "tiles"),
        (Line("bitsandbytes-nf4", "lut8", "nf4_g48", "bf16"), 64, 192, "blocks of"),
        (Line("fdk", "marlin", "int4_g32", "fp16"), 64, 256, "groups of 64 or 128, not 32"),
    ],
)
def test_a_line_that_cannot_run_gives_the_reason(line, n, k, reason):
    if line.provider.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
    with pytest.raises(providers.Unavailable, match=reason):
        providers.prepare(line, providers.Source(line, n, k, CPU, 0))


def test_a_missing_bitsandbytes_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    line = Line("bitsandbytes-nf4", "lut8", "nf4_g64", "bf16")
    with pytest.raises(providers.Unavailable, match="not installed; pip install"):
        providers.prepare(line, providers.Source(line, N, K, CPU, 0))


def test_marlin_lut_is_the_grid_of_marlin():
    table = providers.Source(Line("fdk", "marlin_lut", "lut4_g64", "fp16"), N, K, CPU, 0)
    grid = providers.Source(Line("fdk", "marlin", "int4_g64", "fp16"), N, K, CPU, 0)
    assert torch.equal(table.exact_rows(slice(None)), grid.exact_rows(slice(None)))
