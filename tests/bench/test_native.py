"""The benchmark without Python: records, plots, refusals, and the way to a device and back with a false adb."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fdk.bench import native, plots, records
from fdk.kernels.cpu import build, library

SMALL = ("-m", "1,3", "-k", "256", "-b", "1,4", "--reps", "2", "--inner", "1", "--copies", "2", "--threads", "2")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """bench.cpp on the library of this machine: the kernels need not be compiled again for that."""
    if library.library() is None:
        pytest.skip(library.why_not())
    target = tmp_path_factory.mktemp("native") / "bench"
    shared = library.library().path
    command = [*build.find_compiler(), "-std=c++17", "-O2", f"-I{build.CSRC}", str(native.SOURCE), str(shared)]
    subprocess.run([*command, f"-Wl,-rpath,{shared.parent}", "-pthread", "-o", str(target)], check=True)
    return target


def test_its_records_are_those_of_the_benchmark(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "native.jsonl"
    path.parent.mkdir()
    subprocess.run([program, *SMALL, "--output", path], check=True, capture_output=True)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(tuple(entry) == records.FIELDS for entry in entries)
    assert all(entry["status"] == "ok" and entry["time_p50"] > 0 for entry in entries)
    tests = [(entry["test"], entry["m"], entry["bits"]) for entry in entries]
    assert [test for test, _, _ in tests[:2]] == ["reduce_sum", "memcpy"]
    assert tests[2:] == [
        ("mv", 1, 16), ("mv_lut8", 1, 4), ("mv_lut", 1, 1), ("mv_lut", 1, 4),
        ("mm", 3, 16), ("mm_lut", 3, 1), ("mm_lut", 3, 4),
    ]  # fmt: skip
    assert plots.main([str(path), "--output-dir", str(tmp_path / "figures")]) == 0
    assert list((tmp_path / "figures").glob("*.svg"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-b", "9"], "widths from 1 to 8"),
        (["-m", "0"], "positive integers"),
        (["-k", "100"], "multiple of 16 that divides"),
        (["--isa", "altivec"], "there is no such instruction set"),
        (["--isa"], "needs a value"),
        (["--what", "1"], "not a flag"),
        (["--output", "/dev/null/file"], "cannot write"),
    ],
)
def test_what_it_refuses(program: Path, flags: list[str], message: str) -> None:
    done = subprocess.run([program, *flags], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_an_interrupted_run_leaves_whole_lines(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "native.jsonl"
    running = subprocess.Popen([program, "-k", "512", "--reps", "100000", "--output", path], stderr=subprocess.PIPE)
    while not path.exists():
        time.sleep(0.02)
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    said = running.communicate()[1].decode()
    assert running.returncode == 130 and "interrupted" in said
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_full_disk_leaves_whole_lines(program: Path, tmp_path: Path) -> None:
    """A limit on the size of files, which cuts a write short as a full disk does."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    path = tmp_path / "native.jsonl"
    done = subprocess.run([program, *SMALL, "--output", path], preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2 and f"cannot write {path}: is the disk full?" in done.stderr
    lines = path.read_text().splitlines()
    assert lines and all(tuple(json.loads(line)) == records.FIELDS for line in lines)


ADB = """#!/bin/sh
echo "$@" >> {log}
[ "$1" = -s ] && shift 2
case "$1" in
    devices) printf '* daemon started successfully\\nList of devices attached\\n{devices}\\n\\n' ;;
    push) {push} ;;
    shell) case "$2" in */bench*--output*) {run} ;; esac ;;
    pull) {pull} ;;
esac
"""


@pytest.fixture
def adb(tmp_path: Path, monkeypatch):
    """adb(devices=..., push=..., run=..., pull=...): a script in its place; returns the log of what it is asked."""

    def install(devices: str, push: str = "true", run: str = "true", pull: str = 'cp {records} "$3"') -> Path:
        log, script, fetched = tmp_path / "log", tmp_path / "bin" / "adb", tmp_path / "on-device.jsonl"
        fetched.write_text('{"test": "mv_lut"}\n')
        script.parent.mkdir()
        pull = pull.format(records=fetched)
        script.write_text(ADB.format(log=log, devices=devices, push=push, run=run, pull=pull))
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
        monkeypatch.setattr(native, "binary", lambda machine: tmp_path / machine)
        return log

    return install


def test_push_run_and_fetch(adb, tmp_path: Path) -> None:
    log = adb("phone\\tdevice")
    path = tmp_path / "out.jsonl"
    assert native.main(["--adb", "-m", "1", "--output", str(path)]) == 0
    assert path.read_text() == '{"test": "mv_lut"}\n'
    asked = log.read_text()
    assert f"-s phone push {tmp_path / 'aarch64'}" in asked and "bench -m 1" in asked and "-s phone pull" in asked


def test_records_of_a_run_that_fails_are_fetched(adb, tmp_path: Path) -> None:
    adb("phone\\tdevice", run="exit 130")
    path = tmp_path / "out.jsonl"
    assert native.main(["--adb", "--output", str(path)]) == 130
    assert path.exists()


def test_no_space_here_is_not_taken_for_the_device_s(adb, tmp_path: Path, capsys) -> None:
    adb("phone\\tdevice", pull="echo \"adb: error: cannot write 'out.jsonl': No space left on device\" >&2; exit 1")
    assert native.main(["--adb", "--output", str(tmp_path / "out.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "exit status 0, its records cannot be fetched" in said and native.FOLDER + ":" not in said


@pytest.mark.parametrize("flags", [["--serial", "a"], ["--machine", "aarch64"]])
def test_flags_that_need_another(capsys, flags: list[str]) -> None:
    assert native.main(flags) == 2
    assert "for --" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("devices", "arguments", "message"),
    [
        ("", [], "no device that is ready; connect one"),
        ("phone\\tunauthorized", [], "adb lists only: phone unauthorized"),
        ("a\\tdevice\\nb\\tdevice", [], "2 devices; choose one with --serial: a, b"),
        ("a\\tdevice", ["--serial", "c"], "no device c is ready; adb lists: a"),
    ],
)
def test_the_device_must_be_clear(adb, capsys, devices: str, arguments: list[str], message: str) -> None:
    adb(devices)
    assert native.main(["--adb", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_space_on_the_device(adb, capsys) -> None:
    adb("phone\\tdevice", push="echo 'failed to copy: No space left on device' >&2; exit 1")
    assert native.main(["--adb"]) == 2
    assert "no space left on the device for /data/local/tmp/fdk" in capsys.readouterr().err


def test_without_adb(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.main(["--adb"]) == 2
    assert "adb is not installed" in capsys.readouterr().err


def test_without_a_cross_compiler(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FDK_AARCH64_CXX", "/nonexistent/g++")
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    assert native.main(["--build-only", "bench", "--machine", "aarch64"]) == 2
    assert "g++-aarch64-linux-gnu" in capsys.readouterr().err
