"""Suite-wide rules: a test marked gpu is skipped, with the reason, where there is no CUDA device.

FDK_TEST_SUMMARY names a folder; after a run on a GPU a summary of it goes to <folder>/<device>/gpu-tests.json.
FDK_TEST_PART=2/3 runs every third test from the second on; the summary then joins the parts that were run on one device
and commit, and is complete when all of them are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

PART = os.environ.get("FDK_TEST_PART")
TOGETHER = (
    "tests/integrations/test_memory.py",
    "tests/models/test_tiny.py",
    "tests/packaging/test_install.py",
    "tests/kernels/cpu/test_kernels.py",
    "tests/kernels/test_contract.py",
)
"""Files that one process runs: their tests share what takes long to make, or are thousands that take no time."""
_SAME = ("device", "driver", "versions", "commit", "dirty")


def indices_of(part: str, count: int) -> range:
    """Which of `count` tests belong to a part like "2/3"."""
    index, slash, parts = part.partition("/")
    if not (slash and index.isdigit() and parts.isdigit() and 1 <= int(index) <= int(parts)):
        raise pytest.UsageError(f"FDK_TEST_PART={part}: write 2/3 for the second of three parts")
    return range(int(index) - 1, count, int(parts))


def joined(previous: dict | None, summary: dict, part: str) -> dict:
    """The summary of a part with what `previous`, the file as it is, says of the other parts of the same run."""
    alike = previous is not None and all(previous.get(name) == summary.get(name) for name in _SAME)
    parts = dict(previous.get("parts", {})) if alike else {}
    count = part.partition("/")[2]
    parts = {name: one for name, one in parts.items() if name.partition("/")[2] == count}
    parts[part] = {name: summary[name] for name in ("complete", "passed", "failed", "skipped")}
    return {
        **summary,
        "complete": len(parts) == int(count) and all(one["complete"] for one in parts.values()),
        "passed": sum(one["passed"] for one in parts.values()),
        "failed": [name for one in parts.values() for name in one["failed"]],
        "skipped": dict(sum((Counter(one["skipped"]) for one in parts.values()), Counter()).most_common()),
        "parts": dict(sorted(parts.items())),
    }


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    _skip_without_gpu(items)
    if PART:
        # After -m and -k, so that parts are equally long.
        mine = set(indices_of(PART, len(items)))
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i not in mine])
        items[:] = [item for i, item in enumerate(items) if i in mine]
    if hasattr(config, "workerinput"):
        # What takes long comes first, so that no process ends with it alone.
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class OneByOne(LoadScopeScheduling):
        """Large scopes first, which are the files of TOGETHER; every other test by itself, in order."""

        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            # On a GPU the contract's tests each compile kernels of their own.
            return file if file in TOGETHER and config.option.markexpr != "gpu" else nodeid

    return OneByOne(config, log)


@pytest.fixture(scope="session", autouse=True)
def _shared_folder(request, tmp_path_factory):
    """Where the processes of a run leave for each other what they have compiled."""
    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        base = base.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FDK_TEST_SHARED", str(base / "shared"))
        yield


@pytest.fixture
def pass_in_the_interpreter():
    """Runs a file of tests in a process whose Triton kernels are interpreted; all must pass and none be skipped."""

    def run(cases: Path) -> None:
        if find_spec("triton") is None:
            pytest.skip("the triton package is not installed")
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        text = done.stdout + done.stderr
        assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, text

    return run


def _skip_without_gpu(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items or torch.cuda.is_available():
        return
    if os.environ.get("FDK_REQUIRE_GPU") == "1":
        raise pytest.UsageError("FDK_REQUIRE_GPU=1, but torch sees no CUDA device; check the driver and torch's build")
    skip = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in gpu_items:
        item.add_marker(skip)


def pytest_terminal_summary(terminalreporter, exitstatus):
    folder = os.environ.get("FDK_TEST_SUMMARY")
    if not folder or not torch.cuda.is_available():
        return
    stats = terminalreporter.stats
    skipped = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", []))
    from fdk.bench import records

    facts = records.environment(torch.device("cuda"))
    summary = {
        **{name: facts.get(name) for name in ("device", "driver", "versions", "commit", "dirty", "date")},
        # A run that was cut off says so; what it names as passed is then not the whole suite.
        "complete": exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED),
        "passed": len(stats.get("passed", [])),
        "failed": [report.nodeid for report in (*stats.get("failed", []), *stats.get("error", []))],
        "skipped": dict(skipped.most_common()),
    }
    path = Path(folder) / torch.cuda.get_device_name().lower().replace(" ", "_") / "gpu-tests.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if PART:
        summary = joined(json.loads(path.read_text()) if path.exists() else None, summary, PART)
    path.write_text(json.dumps(summary, indent=2) + "\n")
    terminalreporter.write_line(f"summary in {path}")
