"""The command that measures the host's own costs: its records are whole, and its numbers are those it prints."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from fdk.bench import host, records


def test_it_records_what_it_prints(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setattr(host, "CALLS", 3)
    monkeypatch.setattr(host, "ROUNDS", 3)
    assert host.main(["-n", "64", "-k", "128", "--rounds", "2", "--output-dir", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("bench-host-*.jsonl")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    layers = [entry for entry in entries if entry["test"] == "overhead"]
    rest = entries[len(layers) :]
    assert [entry["through"] for entry in layers] == ["module", "vllm"][: 1 + bool(find_spec("vllm"))]
    for entry in layers:
        if entry["status"] == "ok":
            assert entry["module_p50"] > entry["kernel_p50"] > 0
            assert entry["added_p20"] <= entry["added_p50"] <= entry["added_p80"]
    first = entries[0]
    assert [(entry["format"], entry["codebook"]) for entry in rest] == list(host.QUANTISED)
    for entry in rest:
        assert entry["weights_per_second"] == pytest.approx(64 * 128 / entry["time_p50"])
        assert entry["commit"] == first["commit"] and entry["threads"] == first["threads"]
    printed = capsys.readouterr().out
    assert all(f"quantise {format} {codebook}: " in printed for format, codebook in host.QUANTISED)


def test_they_are_no_kernel_records(tmp_path, monkeypatch) -> None:
    """A folder of results holds both; tables and figures pass these over."""
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(host, "ROUNDS", 1)
    assert host.main(["-n", "64", "-k", "64", "--rounds", "0", "--output-dir", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("bench-host-*.jsonl")
    assert {json.loads(line)["test"] for line in path.read_text().splitlines()} == {"overhead"}
    with pytest.raises(records.RecordError, match="no benchmark records"):
        records.read([tmp_path])


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    (tmp_path / "file").write_text("")
    assert host.main(["--output-dir", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_it_times_calls_alone(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(host, "CALLS", 20)
    monkeypatch.setattr(host, "ROUNDS", 3)
    assert host.main(["--device", "cuda", "--output-dir", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("bench-host-cuda-*.jsonl")
    entry, *others = [json.loads(line) for line in path.read_text().splitlines()]
    assert entry["through"] == "module" and entry["isa"].startswith("sm_")
    assert {other["test"] for other in others} <= {"overhead"}
    assert entry["module_p50"] > 0 and entry["kernel_p50"] > 0
    assert "a call of a module adds" in capsys.readouterr().out
