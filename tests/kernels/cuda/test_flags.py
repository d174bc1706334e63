"""Sets of flags, one for every stream and every stream of a graph; their memory needs no GPU."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fdk.kernels.cuda import driver, flags


class Slow:
    """Sets that are slow to find, so that threads meet while one of them takes a set."""

    def __init__(self, sets: torch.Tensor) -> None:
        self.sets = sets

    def __getitem__(self, i: int) -> torch.Tensor:
        time.sleep(0.02)
        return self.sets[i]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> flags.Flags:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(driver, "capture_id", lambda stream: stream // 100)
    return flags.Flags(torch.device("cpu"))


def test_every_stream_and_capture_has_its_own(found: flags.Flags) -> None:
    places = {stream: found.take(stream).data_ptr() for stream in (0, 1, 101, 201)}
    assert len(set(places.values())) == 4
    assert all(found.take(stream).data_ptr() == place for stream, place in places.items())


def test_threads_that_come_at_once_get_sets_of_their_own(found: flags.Flags) -> None:
    found.sets = Slow(found.sets)
    places: dict[int, int] = {}
    threads = [threading.Thread(target=lambda s=s: places.__setitem__(s, found.take(s).data_ptr())) for s in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(places.values())) == 8
    assert all(found.take(stream).data_ptr() == place for stream, place in places.items())


def test_without_a_set_left_flags_are_new_and_zero(found: flags.Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "_SETS", 2)
    first = [found.take(stream) for stream in (0, 1)]
    spare, again = found.take(2), found.take(2)
    assert not spare.any() and len({t.data_ptr() for t in (*first, spare, again)}) == 4
    assert found.take(0).data_ptr() == first[0].data_ptr()
