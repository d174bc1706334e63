"""--mode: what a mode chooses, what goes before it, and the tables and figures at the end of a run."""

import json

import pytest
import torch

from fdk.bench import main
from fdk.bench.command import settings
from fdk.bench.modes import MODES

SMALL = ["--device", "cpu", "--inner-reps", "1", "--outer-reps", "2", "--shapes", "64x128", "128x128"]


def run(capsys, folder, *arguments):
    """(status, records, what was printed) of a run of the command."""
    status = main([*SMALL, "--output-dir", str(folder), *arguments])
    found = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return status, found, capsys.readouterr().out


def cells(out, first):
    """The last Markdown table whose head begins with `first`, without its rule."""
    lines = out.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith(f"| {first}"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]
    return rows[:1] + rows[2:]


def test_the_sizes_of_matgptq(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = settings(["--mode", "matgptq"])
    assert found.ms == (1, 2, 4, 8, 16, 32, 64)
    assert [(s.n, s.k) for s in found.shapes] == [(size, size) for size in (2048, 4096, 8192, 16384)]
    slices = ("nest8s2_g128", "nest8s3_g128", "nest8s4_g128", "nest8s6_g128", "nest8_g128")
    cut = ("trunc8s2_g128", "trunc8s3_g128", "trunc8s4_g128", "trunc8s6_g128", "trunc8_g128")
    exported = ("int2_g128", "int3_g128", "int4_g128", "int6_g128", "int8_g128")
    assert found.selection.formats == (*slices, *cut, *exported)
    assert found.providers == {"fdk", "torch-bf16"}


def test_the_sizes_of_int4matmul(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = settings(["--mode", "int4matmul"])
    assert 1 in found.ms
    assert 2048 in found.ms
    assert {(8192, 8192), (20480, 5120)} <= {(s.n, s.k) for s in found.shapes}
    assert found.selection.formats == ("uint4_g128", "uint4_g128_sp16of32")


@pytest.mark.parametrize("mode", MODES)
def test_the_command_line_goes_before_a_mode(mode):
    found = settings(["--device", "cpu", "--mode", mode, "-m", "3", "-k", "256", "-b", "4", "-g", "64", "chan"])
    assert found.ms == (3,)
    assert [(s.n, s.k) for s in found.shapes] == [(256, 256)]
    kind = {"matgptq": "nest8s4", "int4matmul": "uint4"}[mode]
    assert {f"{kind}_g64", f"{kind}_chan"} <= set(found.selection.formats)
    named = settings(["--device", "cpu", "--mode", mode, "--format", "trunc8s2_g64", "--providers", "fdk"])
    assert (named.selection.formats, named.providers) == (("trunc8s2_g64",), {"fdk"})


def test_matgptq_prints_its_table_and_draws_its_figure(small, capsys, tmp_path):
    status, found, out = run(capsys, tmp_path, "--mode", "matgptq", "-m", "1", "4", "-b", "2", "8", "--plot")
    assert status == 0
    head, *rows = cells(out, "n x k, format")
    assert head == ["n x k, format: x torch bf16", "batch 1", "batch 4"]
    assert [row[0] for row in rows] == [
        f"{n} x 128 `{name}_g128`"
        for n in (64, 128)
        for name in ("int2", "nest8s2", "trunc8s2", "int8", "nest8", "trunc8")
    ]
    first = next(r for r in found if (r["n"], r["m"], r["format"]) == (64, 4, "nest8s2_g128"))
    assert first["bits"] == 2
    assert float(rows[1][2]) == pytest.approx(first["x_bf16"], rel=1e-2)
    assert (tmp_path / "matgptq.svg").read_text().count("batch") == 2


def test_int4matmul_prints_times_and_errors(small, capsys, tmp_path):
    status, found, out = run(capsys, tmp_path, "--mode", "int4matmul", "-m", "1", "5", "-b", "4", "2")
    assert status == 0
    head, *rows = cells(out, "B")
    assert head == ["B", "S", "N", "M", "sparsity", "left", "right", "us", "error"]
    assert [(row[1], row[3], row[4], row[5]) for row in rows] == [
        (n, m, sparsity, left)
        for m in ("1", "5")
        for n in ("64", "128")
        for sparsity, left in (("", "bf16"), ("", "uint4_g128"), ("", "uint2_g128"), ("16:32", "uint4_g128"))
    ]
    for row, entry in zip(rows, sorted(found, key=lambda r: (r["m"], r["n"])), strict=True):
        assert float(row[8]) == pytest.approx(entry["relative_error"], rel=1e-2)
        # One rounding of the output to bfloat16 errs by 2^-9 at most and is seldom exact.
        assert 1e-4 < entry["relative_error"] < 2**-8


def test_errors_of_products_are_those_of_float64(small, capsys, tmp_path):
    _, found, _ = run(capsys, tmp_path, "--mode", "int4matmul", "-m", "5", "--dtype", "fp32")
    errors = [r["relative_error"] for r in found if r["provider"] == "fdk"]
    assert errors
    assert all(0 < error < 1e-5 for error in errors)


def test_a_mode_that_does_not_exist_is_one_line(capsys):
    assert main(["--mode", "marlin"]) == 2
    assert "invalid choice: 'marlin'" in capsys.readouterr().err
