"""What one process of a test run has compiled, others read: FDK_TEST_SHARED, set in tests/conftest.py, is where."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from fdk.kernels.cuda import jit


def text_of(kind: str, source: jit.Source, make: Callable[[], str]) -> str:
    """What `make` makes of a source, or has made of it in this run; a failure is kept by nobody."""
    folder = os.environ.get("FDK_TEST_SHARED")
    if not folder:
        return make()
    path = Path(folder, f"{jit.cache_key(*source, jit.compiler_version())}.{kind}")
    with contextlib.suppress(FileNotFoundError):
        return zlib.decompress(path.read_bytes()).decode()
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as stream:
        stream.write(zlib.compress(made.encode(), 1))
    os.replace(temporary, path)
    return made
