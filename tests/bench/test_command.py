"""The command line: what it accepts, what it refuses with which words, and whole tiny runs."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fdk.bench import command, main, providers, records
from fdk.bench.command import settings
from fdk.bench.providers import PROVIDERS

TINY = [
    "--device",
    "cpu",
    "-k",
    "128",
    "-n",
    "64",
    "-m",
    "1",
    "--inner-reps",
    "1",
    "--outer-reps",
    "2",
    "--threads",
    "all",
]
GPU_ONLY = {"torch-tinygemm", "humming", "gemlite"}
SOURCE_RUN = "--exclude '' -b 16 8 4 2 1 -k 8192 6144 4096 3072".replace("''", "").split()


def run(capsys, tmp_path, *arguments):
    status = main([*TINY, "--output-dir", str(tmp_path), *arguments])
    return status, *capsys.readouterr()


def test_defaults_are_those_of_the_source():
    found = settings(["--device", "cpu"])
    assert found.ms == (1, 4, 16, 64, 256)
    assert found.shapes == (command.Shape(4096, 4096, 64),)
    assert found.selection.bits == (16, 4, 1)
    assert found.exclude.pattern == "_ref"
    assert not found.include.pattern
    assert found.output_dir == Path("out")
    assert found.shrunk


def test_the_long_run_of_the_source_parses():
    found = settings(["--device", "cpu", "--exclude", "", *SOURCE_RUN[1:]])
    assert [shape.k for shape in found.shapes] == [8192, 6144, 4096, 3072]
    assert all(shape.n == shape.k for shape in found.shapes)
    assert found.selection.bits == (16, 8, 4, 2, 1)
    assert found.exclude is None


def test_n_is_k_or_integers():
    shapes = settings(["--device", "cpu", "-k", "128", "256", "-n", "k", "64"]).shapes
    assert [(s.k, s.n) for s in shapes] == [(128, 128), (128, 64), (256, 256), (256, 64)]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--bitz", "4"], "unrecognized arguments: --bitz"),
        (["-m", "x"], "invalid int value: 'x'"),
        (["-m", "0"], "-m 0: sizes are positive"),
        (["-n", "k2"], "-n 'k2' is neither an integer nor 'k'"),
        (["-k", "100"], "group 64 does not divide k = 100; use"),
        (["-k", "128", "-g", "20"], "group size 20 is not a positive multiple of 16"),
        (["-b", "9"], "-b 9: widths are 1 to 8"),
        (["--providers", "cublas"], "--providers cublas: unknown provider; choose from fdk"),
        (["--include", "("], "--include '(' is not a regular expression"),
        (["--exclude", "*"], "--exclude '*' is not a regular expression"),
        (["--include", "nothing"], "nothing to run: these sizes have marlin"),
        (["--format", "int4"], "--format: 'int4' is not a format name"),
        (["--profile", "mvlut"], "--profile mvlut: unknown benchmark; choose from mv"),
        (["--threads", "4096"], "--threads 4096: torch has"),
        (["--copies", "0"], "--copies 0: at least 1"),
        (["--shapes", "4096"], "--shapes '4096' is not a size; write n x k"),
        (["--shapes", "0x64"], "--shapes '0x64' is not a size"),
        (["--shapes", "64x64", "-k", "64"], "-k and -n have no meaning beside it"),
        (["--jobs", "-1"], "--jobs -1: give 0"),
        (["--peer-seconds", "nan"], "--peer-seconds nan: give 0 or more"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_a_remedy(arguments, complaint, capsys):
    assert main(["--device", "cpu", *arguments]) == 2
    out, err = capsys.readouterr()
    assert complaint in err
    assert err.count("\n") == 1
    assert not out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_where_there_is_none(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err


def test_help_is_no_error(capsys):
    assert main(["--help"]) == 0
    assert "--providers" in capsys.readouterr().out


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_on_the_output_folder(small, capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert main([*TINY, "--output-dir", str(tmp_path / "out")]) == 2
    assert "name another folder with --output-dir" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file(small, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main([*TINY, "--output-dir", str(tmp_path / "file")]) == 2
    assert "cannot write records into" in capsys.readouterr().err


def test_a_run_prints_and_records_every_line(small, capsys, tmp_path):
    status, out, _ = run(capsys, tmp_path, "-b", "16", "4", "1", "--exclude", "")
    assert status == 0
    found = records.read([tmp_path])
    tests = {entry["test"] for entry in found}
    assert tests == {"mv", "mv_ref", "mv_lut8", "mv_lut8_ref", "mv_int", "marlin", "marlin_lut"}
    assert {entry["provider"] for entry in found} == set(PROVIDERS) - {"torch-fp16"} - GPU_ONLY
    for entry in found:
        assert entry["test"] in out
        if entry["status"] == "skipped":
            assert entry["reason"]
            continue
        assert entry["status"] == "ok"
        assert 0 < entry["time_p20"] <= entry["time_p50"] <= entry["time_p80"]
        for field in ("avg_time", "floor", "x_bf16", "x_floor", "read_fraction", "read_bandwidth", "peak", "bytes_rw"):
            assert entry[field] > 0, field
        assert entry["reps"] == 2
        assert entry["floor_memory"] == "weights"
    assert f"{len(found)} records in" in out


def test_jsonl_and_csv_on_standard_output(small, capsys, tmp_path):
    status, out, _ = run(capsys, tmp_path, "-b", "16", "--output", "jsonl")
    assert status == 0
    assert {json.loads(line)["provider"] for line in out.splitlines()} == {"torch-bf16", "torch-float32"}
    status, out, _ = run(capsys, tmp_path, "-b", "16", "--output", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert tuple(rows[0]) == records.FIELDS
    assert float(rows[0]["time_p50"]) > 0


def test_the_baseline_is_timed_but_not_shown_when_it_was_not_asked_for(small, capsys, tmp_path):
    run(capsys, tmp_path, "-b", "4", "--include", "mv_lut8", "--providers", "fdk")
    (entry,) = records.read([tmp_path])
    assert entry["x_bf16"] > 0


def test_one_kernel_can_be_asked_for(small, capsys, tmp_path):
    run(capsys, tmp_path, "-b", "2", "--providers", "fdk:reference")
    (entry,) = records.read([tmp_path])
    assert (entry["test"], entry["provider"], entry["kernel"]) == ("mv_lut8", "fdk:reference", "reference")


def test_a_wrong_product_gets_no_time_and_makes_the_run_fail(small, capsys, tmp_path, monkeypatch):
    class Wrong(providers.TorchDense):
        def run(self, x, index, out):
            y = super().run(x, index, out)
            y[-1, -1] *= 1.05
            return y

    monkeypatch.setitem(PROVIDERS, "torch-float32", Wrong)
    status, out, _ = run(capsys, tmp_path, "-b", "16")
    assert status == 1
    wrong = [entry for entry in records.read([tmp_path]) if entry["status"] == "failed"]
    assert [entry["provider"] for entry in wrong] == ["torch-float32"]
    assert wrong[0]["time_p50"] is None
    assert "times the bound" in wrong[0]["reason"]
    assert "FAILED mv fp32 torch-float32" in out
    assert "1 product failed the correctness check" in out
    assert "| mv fp32 torch-float32" not in out


def test_a_provider_that_cannot_run_is_listed_with_its_reason(small, capsys, tmp_path):
    _, out, _ = run(capsys, tmp_path, "-b", "4", "-g", "16")
    assert "not run: mv_int int4_g16 torch-int4pack: it has groups of" in out
    assert "not run: marlin int4_g16 fdk: the format has groups of 64 or 128, not 16" in out


def test_an_error_in_a_peer_is_a_reason_and_in_ours_a_failure(small, capsys, tmp_path, monkeypatch):
    def broken(self, x, index, out):
        raise RuntimeError("no such tile\nmore")

    monkeypatch.setattr(providers.TorchInt4Pack, "run", broken)
    monkeypatch.setattr(providers.Fdk, "run", broken)
    status, out, _ = run(capsys, tmp_path, "-b", "4", "--include", "mv")
    assert status == 1
    assert "not run: mv_int int4_g64 torch-int4pack: no such tile" in out
    assert "FAILED mv_lut8 lut4_g64 fdk" in out


def test_profile_runs_one_benchmark_without_checks_or_times(small, capsys, tmp_path):
    status, out, _ = run(capsys, tmp_path, "--profile", "mv_lut8", "-b", "4")
    assert status == 0
    assert "ran 2 calls of mv_lut8 lut4_g64 fdk" in out
    assert "|" not in out
    assert not list(tmp_path.iterdir())


def test_plot_draws_into_the_output_folder(small, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert run(capsys, tmp_path, "-b", "16", "--plot")[0] == 0
    threads = records.read([tmp_path])[0]["threads"]
    assert (tmp_path / f"roofline_64x128_t{threads}.svg").exists()


@pytest.mark.parametrize(
    "weight_bytes, wanted, room, expected",
    [
        (9_000_000, None, 10**12, 36),
        (500, None, 10**12, command.MOST_COPIES),
        (9_000_000, 5, 10**12, 5),
        (9_000_000, None, 20_000_000, 2),
        (9_000_000, None, 1, 1),
    ],
)
def test_copies_are_enough_to_be_cold_within_limits(weight_bytes, wanted, room, expected):
    assert command.copies_for(weight_bytes, wanted, torch.device("cpu"), room) == expected


PROBE = """
import os, sys
sys.argv = ["fdk", "bench"]
from fdk.bench import command
calls = []
def execve(path, arguments, environment):
    calls.append(environment["OMP_PROC_BIND"])
    os.environ["OMP_PROC_BIND"] = environment["OMP_PROC_BIND"]
os.execve = execve
command.rebind(None, True)
command.rebind(None, True)
command.rebind(None, False)
print(calls)
"""


def test_the_process_is_bound_once_and_only_for_the_cpu():
    environment = {name: value for name, value in os.environ.items() if name != "OMP_PROC_BIND"}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "['true']", done.stderr


def test_a_process_that_is_not_ours_is_warned_and_not_replaced(monkeypatch):
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("replaced"))
    assert "OMP_PROC_BIND is not set" in command.rebind(["-m", "1"], True)
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    assert command.rebind(["-m", "1"], True) is None
