"""The benchmark without Python: build bench.cpp with the kernels into one static binary, run it, keep its records.

    python -m fdk.bench.native [flags of the binary]                    on this machine (x86 or ARM)
    python -m fdk.bench.native --adb [--serial ID] [flags]              on an Android device, untested on a real one
    python -m fdk.bench.native --build-only FILE [--machine aarch64]    only the binary

The records go to out/native-<date>.jsonl and are those of fdk.bench, so that `fdk plot` draws them. For another
architecture than this one a cross compiler is needed: g++-aarch64-linux-gnu, or $FDK_AARCH64_CXX. No NDK is.
"""

from __future__ import annotations

import datetime
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from fdk.bench.records import environment
from fdk.kernels.cpu import build

SOURCE = Path(__file__).parent / "csrc" / "bench.cpp"
FOLDER = "/data/local/tmp/fdk"


class NativeError(Exception):
    """The benchmark cannot be built or run; the text names the remedy."""


def binary(machine: str) -> Path:
    """The static binary for an architecture, built once for these sources."""
    compiler = build.compiler_for(machine)
    target = build.cache_directory() / f"bench-{machine}-{build.cache_key(compiler, SOURCE)}" / "bench"
    if not target.exists():
        print(f"building {target} (a minute or two)", file=sys.stderr)
        build.build_program(SOURCE, target, compiler, machine)
    return target


def _adb(serial: str | None, *arguments: str) -> str:
    """Output of adb; NativeError with what it says."""
    command = ["adb", *(["-s", serial] if serial else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    said = (done.stderr.strip() or done.stdout.strip()).replace("\n", "; ")
    if done.returncode:
        if "No space left" in said and "pull" not in arguments:
            raise NativeError(
                f"no space left on the device for {FOLDER}: delete something there, then run again ({said})"
            )
        raise NativeError(f"{shlex.join(command)}: {said}")
    return done.stdout


def device(serial: str | None) -> str:
    """The serial number of the one device to use; NativeError if there is none, or several to choose from."""
    if not shutil.which("adb"):
        raise NativeError("adb is not installed; on Debian: apt-get install adb")
    # A line with a tab for each device; some versions speak of their daemon first.
    lines = [line.split() for line in _adb(None, "devices").splitlines() if "\t" in line]
    ready = [line[0] for line in lines if line[1] == "device"]
    others = ", ".join(" ".join(line[:2]) for line in lines if line[1] != "device")
    if serial is not None:
        if serial not in ready:
            raise NativeError(f"no device {serial} is ready; adb lists: {', '.join(ready) or others or 'none'}")
        return serial
    if not ready:
        remedy = f"adb lists only: {others}" if others else "connect one with USB debugging switched on"
        raise NativeError(f"adb sees no device that is ready; {remedy}")
    if len(ready) > 1:
        raise NativeError(f"adb sees {len(ready)} devices; choose one with --serial: {', '.join(ready)}")
    return ready[0]


def on_device(serial: str | None, flags: list[str], output: Path) -> int:
    """Push, run, fetch. What an interrupted run has written is fetched too; its lines are whole."""
    serial = device(serial)
    remote = f"{FOLDER}/records.jsonl"
    program = binary("aarch64")
    _adb(serial, "shell", f"mkdir -p {FOLDER} && rm -f {remote}")
    _adb(serial, "push", str(program), f"{FOLDER}/bench")
    _adb(serial, "shell", f"chmod 755 {FOLDER}/bench")
    command = shlex.join([f"{FOLDER}/bench", *flags, "--output", remote])
    try:
        status = subprocess.run(["adb", "-s", serial, "shell", command]).returncode
    except KeyboardInterrupt:
        status = 130
    try:
        _adb(serial, "pull", remote, str(output))
    except NativeError as error:
        raise NativeError(f"the run ended with exit status {status}, its records cannot be fetched: {error}") from None
    return status


def main(arguments: list[str] | None = None) -> int:
    flags = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in flags or "--help" in flags:
        print(__doc__)
        flags = ["--help"]

    def take(name: str) -> str | None:
        if name not in flags:
            return None
        at = flags.index(name)
        if at + 1 == len(flags):
            raise NativeError(f"{name} needs a value")
        value = flags[at + 1]
        del flags[at : at + 2]
        return value

    try:
        adb = "--adb" in flags
        if adb:
            flags.remove("--adb")
        serial, wanted, machine = take("--serial"), take("--build-only"), take("--machine")
        if serial and not adb:
            raise NativeError("--serial names a device for --adb")
        if machine and not wanted:
            raise NativeError("--machine names an architecture for --build-only")
        if wanted:
            shutil.copy(binary(machine or platform.machine()), wanted)
            return 0
        output = take("--output")
        now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
        path = Path(output) if output else Path("out") / f"native-{now}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        run = environment(torch.device("cpu"))
        if run["commit"]:
            flags += ["--commit", run["commit"], "--dirty", str(bool(run["dirty"])).lower()]
        if adb:
            status = on_device(serial, flags, path)
        else:
            try:
                status = subprocess.run([str(binary(platform.machine())), *flags, "--output", str(path)]).returncode
            except KeyboardInterrupt:
                status = 130
    except (NativeError, build.BuildError, OSError) as error:
        print(f"fdk.bench.native: {error}", file=sys.stderr)
        return 2
    if path.exists():
        print(f"records in {path}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
