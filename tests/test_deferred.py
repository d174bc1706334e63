"""Modules imported behind somebody else's: once, in any order, and without harm to that one."""

from __future__ import annotations

import importlib
import sys

import pytest

from fdk.deferred import after_import


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Importable modules `theirs_x`, `ours_x` and one that cannot be imported; gone again after the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "theirs_x.py").write_text("value = 1\n")
    (tmp_path / "ours_x.py").write_text("import theirs_x\nseen = theirs_x.value\n")
    (tmp_path / "broken_x.py").write_text("import a_module_that_does_not_exist\n")
    finders = list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    for name in ("theirs_x", "ours_x", "broken_x"):
        sys.modules.pop(name, None)


def test_ours_comes_right_behind_theirs(package):
    finders = len(sys.meta_path)
    after_import("theirs_x", "ours_x")
    after_import("theirs_x", "ours_x")
    assert len(sys.meta_path) == finders + 1
    assert not {"theirs_x", "ours_x"} & set(sys.modules)
    importlib.import_module("theirs_x")
    assert sys.modules["ours_x"].seen == 1
    assert len(sys.meta_path) == finders


def test_ours_comes_at_once_where_theirs_is_there(package):
    importlib.import_module("theirs_x")
    after_import("theirs_x", "ours_x")
    assert sys.modules["ours_x"].seen == 1


def test_theirs_works_where_ours_does_not(package):
    after_import("theirs_x", "broken_x")
    with pytest.warns(UserWarning, match="broken_x is not in use: No module named 'a_module_that_does_not_exist'"):
        assert importlib.import_module("theirs_x").value == 1


def test_a_module_that_does_not_exist_is_missed_as_ever(package):
    after_import("nowhere_x", "ours_x")
    with pytest.raises(ModuleNotFoundError, match="nowhere_x"):
        importlib.import_module("nowhere_x")
