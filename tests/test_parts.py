"""Parts of the suite: every test in one of them, and a summary that is complete when all parts are."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("suite_rules", Path(__file__).parent / "conftest.py")
rules = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(rules)


def summary(**changes) -> dict:
    facts = {"device": "NVIDIA H200", "driver": "1", "versions": "torch 2", "commit": "abc", "dirty": False}
    counts = {"complete": True, "passed": 5, "failed": ["a"], "skipped": {"no GPU": 2}}
    return {**facts, "date": "today", **counts, **changes}


@pytest.mark.parametrize("count", [0, 1, 7, 100])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_every_test_is_in_one_part(parts: int, count: int) -> None:
    found = [i for part in range(1, parts + 1) for i in rules.indices_of(f"{part}/{parts}", count)]
    assert sorted(found) == list(range(count))


@pytest.mark.parametrize("wrong", ["", "2", "0/3", "4/3", "1/x", "-1/2"])
def test_what_is_no_part(wrong: str) -> None:
    with pytest.raises(pytest.UsageError, match="FDK_TEST_PART"):
        rules.indices_of(wrong, 10)


def test_parts_join_to_a_complete_summary() -> None:
    first = rules.joined(None, summary(), "1/2")
    assert not first["complete"] and first["passed"] == 5
    both = rules.joined(first, summary(passed=6, failed=[], skipped={"no GPU": 1, "other": 1}), "2/2")
    assert both["complete"] and both["passed"] == 11 and both["failed"] == ["a"]
    assert both["skipped"] == {"no GPU": 3, "other": 1} and list(both["parts"]) == ["1/2", "2/2"]
    # A part run again replaces its result; one that was cut off makes the whole incomplete.
    again = rules.joined(both, summary(complete=False, passed=1, failed=["b"]), "1/2")
    assert not again["complete"] and again["passed"] == 7 and again["failed"] == ["b"]


@pytest.mark.parametrize("changes", [{"commit": "def"}, {"device": "NVIDIA H100"}, {"dirty": True}, {"parts": {}}])
def test_parts_of_other_runs_do_not_count(changes: dict) -> None:
    first = rules.joined(None, summary(), "1/2") | changes
    second = rules.joined(first, summary(), "2/2")
    assert not second["complete"] and list(second["parts"]) == ["2/2"]
    assert list(rules.joined(rules.joined(None, summary(), "1/3"), summary(), "1/2")["parts"]) == ["1/2"]


def test_a_run_of_a_part_takes_every_other_test() -> None:
    file = Path(__file__).parent / "formats" / "test_formats.py"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(file)]
    names = {}
    for part in ("", "1/2", "2/2"):
        environment = {**os.environ, "FDK_TEST_PART": part}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        names[part] = [line for line in done.stdout.splitlines() if "::" in line]
    assert names[""][::2] == names["1/2"] and names[""][1::2] == names["2/2"]
