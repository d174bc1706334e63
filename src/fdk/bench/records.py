"""Records: one flat JSON object a line, with everything needed to read a number later.

Times are seconds, sizes bytes, rates per second. `status` is "ok", "failed" (the product was wrong, no times) or
"skipped" (it could not run); `reason` says why for the last two.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from fdk.errors import FdkError

FIELDS = (
    "test", "m", "k", "n", "g", "bits", "format", "dtype", "provider", "kernel", "status", "reason",
    "copies", "inner_reps", "reps", "settle", "launch", "bytes_rw", "ops",
    "avg_time", "time_p20", "time_p50", "time_p80",
    "floor", "floor_plain", "floor_memory", "floor_reader", "x_bf16", "x_bf16_p20", "x_bf16_p80", "x_floor",
    "read_fraction", "relative_error",
    "chain_time", "x_chain",
    "read_bandwidth", "copy_bandwidth", "peak", "reader",
    "threads", "isa", "device", "driver", "versions", "commit", "dirty", "date", "id",
)  # fmt: skip
"""Every field of a record, in order. A record has all of them; what does not apply is null."""

TIMED = (
    "dtype", "bits", "m", "n", "k", "bytes_rw", "ops", "time_p20", "time_p50", "time_p80", "device", "threads", "date",
)  # fmt: skip
"""What a record with status "ok" must have to be drawn or put into a table; fields that came later may be missing."""

Record = dict[str, object]


class RecordError(ValueError):
    """A file of records cannot be read; the text names the line and the remedy."""


def record(**fields: object) -> Record:
    """A record with every field of FIELDS in order; a name that is not among them is an error."""
    if unknown := fields.keys() - set(FIELDS):
        raise TypeError(f"unknown record fields: {', '.join(sorted(unknown))}")
    return {name: fields.get(name) for name in FIELDS}


def _git(*arguments: str) -> str | None:
    """Output of git in the checkout that this package was imported from; None outside one."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    try:
        command = ["git", "-C", str(root), *arguments]
        top = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--show-toplevel"], capture_output=True, text=True, timeout=10
        )
        # An installed package may lie inside some other project's checkout, whose commit means nothing here.
        if top.returncode or not Path(top.stdout.strip()).samefile(root) or root / "src" / "fdk" != package:
            return None
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return None if done.returncode else done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """The processor's name, with family and model where the name alone does not tell the generation."""
    try:
        pairs = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
        facts = {key.strip(): value.strip() for key, _, value in pairs}
        if name := facts.get("model name"):
            return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_isa() -> str:
    """The instruction set of fdk's CPU kernels, or torch's where there are none."""
    from fdk.kernels.cpu import info

    isa = info()["isa"]
    return str(isa) if isa else f"torch {torch.backends.cpu.get_cpu_capability()}"


def versions() -> str:
    """'name version' of everything that a time may depend on, comma-separated."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for label, package in (
        ("fdk", "fused-dequantisation-kernels"), ("bitsandbytes", "bitsandbytes"), ("triton", "triton"),
        ("humming", "humming-kernels"), ("gemlite", "gemlite"), ("nvrtc", "nvidia-cuda-nvrtc"),
    ):  # fmt: skip
        try:
            found[label] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "fdk" not in found:
        import fdk

        found["fdk"] = fdk.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return ", ".join(f"{name} {version}" for name, version in found.items())


def environment(device: torch.device) -> Record:
    """The fields that are the same for a whole run: device, driver, isa, versions, commit, dirty, date, id."""
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    if device.type == "cuda":
        name, driver = torch.cuda.get_device_name(device), _driver()
        isa = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        # The process may see one core only, because the OpenMP runtime binds its first thread to one.
        name, isa = f"{cpu_name()}, {os.cpu_count()} cores", cpu_isa()
        driver = f"{platform.system()} {platform.release()}"
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "device": name,
        "driver": driver,
        "isa": isa,
        "versions": versions(),
        # A copy of the tree without its history is told its commit.
        "commit": commit or os.environ.get("FDK_COMMIT"),
        "dirty": None if status is None else bool(status),
        "date": now.isoformat(),
        "id": f"{device.type}-{now.strftime('%Y-%m-%dT%H-%M-%S')}-{os.getpid()}",
    }


def _driver() -> str | None:
    """Version of the GPU driver, None where nvidia-smi does not say."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None
    except (OSError, subprocess.SubprocessError):
        return None


class Writer:
    """Appends records to a file, a whole line at a time, so that an interrupted run leaves whole records.

    FdkError, naming the file or folder, if it cannot be written.
    """

    def __init__(self, folder: Path, id: str) -> None:
        self.path = folder / f"bench-{id}.jsonl"
        self.count = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise FdkError(
                f"cannot write records into {folder} ({error.strerror}); name another folder with --output-dir"
            ) from None

    def write(self, record: Record) -> None:
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        try:
            written, reason = os.write(self._file, line), "only a part of it"
        except OSError as error:
            written, reason = 0, error.strerror
        if written != len(line):
            raise FdkError(f"{self.path}: a record could not be written ({reason}); free some space and run again")
        self.count += 1

    def close(self) -> None:
        """Close; a file without records is removed."""
        os.close(self._file)
        if not self.count:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def files(paths: Iterable[Path]) -> list[Path]:
    """The JSONL files among `paths`, folders searched to any depth; RecordError if there is none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(path.rglob("*.jsonl"))
        elif path.exists():
            found.append(path)
        else:
            raise RecordError(f"{path} does not exist; name the .jsonl files that a benchmark wrote, or their folder")
    if not found:
        raise RecordError(f"no .jsonl files in {', '.join(map(str, paths))}; run python -m fdk.bench first")
    return found


def read(paths: Iterable[Path]) -> list[Record]:
    """The benchmark records of files and folders; lines of other logs are passed over, broken ones a RecordError."""
    records: list[Record] = []
    for path in files(list(paths)):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise RecordError(f"{path} is not text, so it holds no records; leave it out") from None
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecordError(f"{path}:{number} is not JSON ({error.msg}); remove the line") from None
            if isinstance(entry, dict) and {"test", "provider", "format", "status"} <= entry.keys():
                if entry["status"] == "ok" and (missing := [name for name in TIMED if name not in entry]):
                    raise RecordError(f"{path}:{number} lacks {', '.join(missing)}; remove the line, or measure again")
                records.append(entry)
    if not records:
        raise RecordError("no benchmark records in these files; run python -m fdk.bench first")
    return records
