"""Finding, building and refusing the library, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fdk.kernels.cpu import build, library

INFO = "import json, torch, fdk.kernels.cpu as cpu; print(json.dumps(cpu.info()))"


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    source = str(Path(build.__file__).parents[3])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_importing_needs_no_compiler_and_loads_nothing(tmp_path: Path) -> None:
    code = "import fdk.kernels.cpu; from fdk.kernels.cpu.library import _load; print(_load.cache_info().currsize)"
    done = python(code, CXX="/nonexistent/compiler", FDK_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"
    assert not list(tmp_path.iterdir())


def test_without_library_and_compiler_the_reason_is_given(tmp_path: Path) -> None:
    code = f"from fdk.kernels.cpu import build; from pathlib import Path; build.LIBRARY = Path('/nonexistent'); {INFO}"
    done = python(code, CXX="/nonexistent/compiler", FDK_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["library"] is None
    assert "compiler" in facts["reason"]


@pytest.mark.parametrize("name", library.ISAS)
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    if library.library() is None:
        pytest.skip(library.why_not())
    done = python(INFO, FDK_CPU_ISA=name)
    if name in library.library().isas():
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["isa"] == name
    else:
        assert "this machine" in done.stderr and name in done.stderr


def test_an_unknown_instruction_set_names_those_there_are() -> None:
    if library.library() is None:
        pytest.skip(library.why_not())
    done = python(INFO, FDK_CPU_ISA="altivec")
    assert done.returncode != 0
    assert "UnsupportedError" in done.stderr and "altivec" in done.stderr and "generic" in done.stderr


def test_torch_openmp_runtime_is_used() -> None:
    if library.library() is None:
        pytest.skip(library.why_not())
    assert library.library().openmp, "torch on Linux loads an OpenMP runtime, which must be found"
    linked = subprocess.run(["ldd", str(library.library().path)], capture_output=True, text=True).stdout
    assert "libgomp" not in linked and "libiomp" not in linked


def test_a_library_of_other_sources_is_refused(tmp_path: Path) -> None:
    if library.library() is None:
        pytest.skip(library.why_not())
    stale = tmp_path / "stale.so"
    stale.write_bytes(library.library().path.read_bytes().replace(build.source_digest().encode(), b"0" * 20))
    with pytest.raises(OSError, match="other sources"):
        library.Library(stale, None)


def test_a_finished_build_is_reused_from_a_read_only_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = build.find_compiler()
    if compiler is None or library.library() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("FDK_CACHE_DIR", str(tmp_path))
    target = tmp_path / f"cpu-{build.cache_key(compiler)}" / build.LIBRARY.name
    target.parent.mkdir()
    shutil.copy(library.library().path, target)
    target.parent.chmod(0o555)
    monkeypatch.setattr(build, "build", lambda *_: pytest.fail("built again"))
    assert build.cached_library() == target


def test_a_failing_compiler_leaves_nothing_behind(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no such luck\nexit 3\n")
    compiler.chmod(0o755)
    with pytest.raises(build.BuildError, match="no such luck"):
        build.build(tmp_path / "out" / "library.so", [str(compiler)])
    assert not (tmp_path / "out").exists()
