"""Suite-wide rules: a test marked gpu is skipped, with the reason, where there is no CUDA device."""

import os

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
