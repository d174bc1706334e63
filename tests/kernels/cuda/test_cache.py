"""The cubin cache: keyed on everything, atomic, usable read-only, and healed when damaged. No compiler needed."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from fdk.errors import UnsupportedError
from fdk.kernels.cuda import jit

DEFINES = {"FDK_A": 1}


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler that counts its runs and returns what it was asked for; the cache directory."""
    runs = []

    def build(file, defines, arch):
        runs.append((file, dict(defines), arch))
        return f"{file} {sorted(defines.items())} {arch}".encode(), ""

    monkeypatch.setattr(jit, "build", build)
    monkeypatch.setattr(jit, "compiler_version", lambda: (13, 0))
    monkeypatch.setenv("FDK_CACHE_DIR", str(tmp_path / "cache"))
    return runs, tmp_path / "cache"


def test_second_call_reads_the_file(compiler) -> None:
    runs, cache = compiler
    first = jit.cubin("decode.cuh", DEFINES, "sm_90a")
    assert jit.cubin("decode.cuh", DEFINES, "sm_90a") == first
    assert len(runs) == 1
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]


def test_key_depends_on_everything(compiler, monkeypatch) -> None:
    base = jit.cache_key("decode.cuh", DEFINES, "sm_90a", (13, 0))
    others = [
        jit.cache_key("stream.cuh", DEFINES, "sm_90a", (13, 0)),
        jit.cache_key("decode.cuh", {"FDK_A": 2}, "sm_90a", (13, 0)),
        jit.cache_key("decode.cuh", DEFINES, "sm_80", (13, 0)),
        jit.cache_key("decode.cuh", DEFINES, "sm_90a", (13, 1)),
    ]
    changed = {**jit.sources(), "ptx.cuh": jit.sources()["ptx.cuh"] + "//"}
    monkeypatch.setattr(jit, "sources", lambda: changed)
    others.append(jit.cache_key("decode.cuh", DEFINES, "sm_90a", (13, 0)))
    assert len({base, *others}) == 6


@pytest.mark.parametrize("damage", [b"", b"fdk-cubin-1\n", b"garbage" * 100])
def test_damaged_file_is_built_again(compiler, damage: bytes) -> None:
    runs, cache = compiler
    good = jit.cubin("decode.cuh", DEFINES, "sm_90a")
    (path,) = cache.iterdir()
    path.write_bytes(damage)
    assert jit.cubin("decode.cuh", DEFINES, "sm_90a") == good
    assert jit.cubin("decode.cuh", DEFINES, "sm_90a") == good
    assert len(runs) == 2


def test_truncated_file_is_built_again(compiler) -> None:
    runs, cache = compiler
    good = jit.cubin("decode.cuh", DEFINES, "sm_90a")
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert jit.cubin("decode.cuh", DEFINES, "sm_90a") == good
    assert len(runs) == 2


def test_a_cache_that_cannot_be_written_is_no_error(compiler) -> None:
    runs, cache = compiler
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the directory should be")
    assert jit.cubin("decode.cuh", DEFINES, "sm_90a") == jit.cubin("decode.cuh", DEFINES, "sm_90a")
    assert len(runs) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only directories")
def test_read_only_cache_is_read(compiler) -> None:
    runs, cache = compiler
    good = jit.cubin("decode.cuh", DEFINES, "sm_90a")
    cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert jit.cubin("decode.cuh", DEFINES, "sm_90a") == good
    jit.cubin("decode.cuh", {"FDK_A": 2}, "sm_90a")
    assert len(runs) == 2


def test_many_at_once_agree_and_leave_no_temporary_files(compiler) -> None:
    _, cache = compiler
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: jit.cubin("decode.cuh", {"FDK_A": i % 2}, "sm_90a"), range(64)))
    assert len(set(results)) == 2
    assert sorted(path.suffix for path in cache.iterdir()) == [".cubin", ".cubin"]


def test_ahead_compiles_what_is_missing_once_and_says_how_far_it_is(compiler) -> None:
    runs, cache = compiler
    jit.cubin("decode.cuh", DEFINES, "sm_90a")
    sources = [("decode.cuh", {"FDK_A": i % 4}, "sm_90a") for i in range(12)]
    seen = []
    assert jit.compile_ahead(sources, lambda done, of: seen.append((done, of))) == 3
    assert len(runs) == 4 and seen == [(1, 3), (2, 3), (3, 3)]
    assert jit.compile_ahead(sources) == 0 and len(runs) == 4
    assert len(list(cache.iterdir())) == 4


def test_ahead_compiles_nothing_that_cannot_be_kept(compiler) -> None:
    runs, cache = compiler
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file where the directory should be")
    assert not jit.writable()
    assert jit.compile_ahead([("decode.cuh", DEFINES, "sm_90a")]) == 0 and runs == []


def test_ahead_passes_on_what_does_not_compile(compiler, monkeypatch) -> None:
    def build(file, defines, arch):
        if defines["FDK_A"] == 3:
            raise RuntimeError("NVRTC failed: FDK_A is 3")
        return b"code", ""

    monkeypatch.setattr(jit, "build", build)
    with pytest.raises(RuntimeError, match="FDK_A is 3"):
        jit.compile_ahead([("decode.cuh", {"FDK_A": i}, "sm_90a") for i in range(8)])


def test_architecture_names() -> None:
    names = {"sm_80": (8, 0), "sm_89": (8, 9), "sm_90a": (9, 0), "sm_100a": (10, 0), "sm_121a": (12, 1)}
    assert {jit.architecture(capability): capability for capability in names.values()} == names
    assert {name: jit.capability(name) for name in names} == names
    for wrong in ("90", "sm90", "sm_", "sm_9", "hopper", "compute_90"):
        with pytest.raises(UnsupportedError, match="names no architecture"):
            jit.capability(wrong)
