"""What the tests of whole runs share."""

import pytest
import torch

from fdk.bench import command, roofline


@pytest.fixture
def small(monkeypatch):
    """Small pools and few copies, so that a run takes a moment."""
    monkeypatch.setattr(roofline, "POOL_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(roofline, "READ_BYTES", {"cpu": 1 << 18})
    monkeypatch.setattr(roofline, "PEAK_SIZE", {"cpu": 64})
    monkeypatch.setattr(command, "cold_bytes", lambda device: 50_000)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
