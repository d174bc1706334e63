"""The command that measures the host's own costs: its records are whole, and its numbers are those it prints."""

from __future__ import annotations

import json

import pytest

from fdk.bench import host, records


def test_it_records_what_it_prints(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setattr(host, "CALLS", 3)
    monkeypatch.setattr(host, "ROUNDS", 3)
    assert host.main(["-n", "64", "-k", "128", "--rounds", "2", "--output-dir", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("bench-host-*.jsonl")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    first, *rest = entries
    assert first["test"] == "overhead"
    if first["status"] == "ok":
        assert first["module_p50"] > first["kernel_p50"] > 0
        assert first["added_p20"] <= first["added_p50"] <= first["added_p80"]
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
    assert host.main(["-n", "64", "-k", "64", "--rounds", "1", "--output-dir", str(tmp_path)]) == 0
    with pytest.raises(records.RecordError, match="no benchmark records"):
        records.read([tmp_path])


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    (tmp_path / "file").write_text("")
    assert host.main(["--output-dir", str(tmp_path / "file")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
