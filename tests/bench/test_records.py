"""Records: the schema, whole lines, the environment inside and outside a checkout."""

import errno
import json
import os

import pytest
import torch

from fdk.bench import records
from fdk.errors import FdkError

DEMANDED = {
    *("test", "m", "k", "n", "g", "bits", "format", "provider", "kernel", "copies", "reps", "bytes_rw", "ops"),
    *("avg_time", "time_p20", "time_p50", "time_p80", "floor", "device", "driver", "versions", "commit", "dirty"),
    *("threads", "isa", "date", "read_bandwidth", "peak"),
}


def test_a_record_has_every_field_and_is_flat():
    entry = records.record(test="mv", m=1, **records.environment(torch.device("cpu")), threads=2)
    assert set(entry) >= DEMANDED
    assert tuple(entry) == records.FIELDS
    assert not any(isinstance(value, dict | list) for value in entry.values())
    for name in ("device", "isa", "versions", "date", "id"):
        assert entry[name]


def test_an_unknown_field_is_an_error():
    with pytest.raises(TypeError, match="unknown record fields: tset"):
        records.record(tset="mv")


def test_lines_are_whole_and_come_back(tmp_path):
    with records.Writer(tmp_path / "deep" / "er", "x") as writer:
        writer.write(records.record(test="mv", provider="fdk", format="lut4_g64", status="ok"))
        writer.write(records.record(test="mm", provider="fdk", format="lut4_g64", status="failed", reason="a\nb"))
        assert writer.path.read_bytes().count(b"\n") == 2
    assert [entry["test"] for entry in records.read([tmp_path])] == ["mv", "mm"]


def test_a_file_without_records_is_not_left_behind(tmp_path):
    with records.Writer(tmp_path, "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_nan_is_never_written(tmp_path):
    with records.Writer(tmp_path, "x") as writer, pytest.raises(ValueError):
        writer.write(records.record(floor=float("nan")))


def test_no_commit_outside_a_checkout_of_this_package(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "site-packages" / "fdk" / "bench" / "records.py"))
    found = records.environment(torch.device("cpu"))
    assert found["commit"] is None
    assert found["dirty"] is None


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert records.environment(torch.device("cpu"))["commit"] is None


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("{", "b.jsonl:1 is not JSON"),
        ("", "no benchmark records"),
        (json.dumps({"model": "tiny", "tokens": 1}), "no benchmark records"),
        (
            json.dumps({"test": "mv", "provider": "fdk", "format": "int4_g64", "status": "ok"}),
            "b.jsonl:1 lacks dtype, bits",
        ),
        (b"\xff\xfe\x00", "b.jsonl is not text"),
    ],
)
def test_unreadable_files_are_named(tmp_path, text, complaint):
    path = tmp_path / "b.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(records.RecordError, match=complaint):
        records.read([path])


def test_missing_files_and_empty_folders_are_named(tmp_path):
    with pytest.raises(records.RecordError, match="does not exist"):
        records.read([tmp_path / "no.jsonl"])
    with pytest.raises(records.RecordError, match=r"no \.jsonl files"):
        records.read([tmp_path])


def test_a_folder_or_disk_that_takes_no_records_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(FdkError, match=r"cannot write records into .*file \(File exists\); name another folder"):
        records.Writer(tmp_path / "file", "x")

    def full(handle, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = records.Writer(tmp_path / "out", "x")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(FdkError, match=r"bench-x.jsonl: a record could not be written \(No space left on device\)"):
        writer.write({"test": "x"})
    writer.close()
    assert not list((tmp_path / "out").iterdir())
