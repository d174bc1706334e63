"""Suite-wide rules: a test marked gpu is skipped, with the reason, where there is no CUDA device.

FDK_TEST_SUMMARY names a folder; after a run on a GPU a summary of it goes to <folder>/<device>/gpu-tests.json.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
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
    path.write_text(json.dumps(summary, indent=2) + "\n")
    terminalreporter.write_line(f"summary in {path}")
