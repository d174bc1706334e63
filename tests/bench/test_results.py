"""The tables of README.md and docs/results.md are what `make figures` makes of the committed records."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = [
    (module, shlex.split(arguments), into)
    for module, arguments, into in re.findall(r"-m fdk\.bench\.(\w+) (.*?) +--into (\S+)", MAKEFILE)
]


def test_every_generated_table_is_known():
    marked = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for name in re.findall(r"<!-- /(\w+) -->", path.read_text(encoding="utf-8"))
    }
    assert marked == {(into, module) for module, _, into in COMMANDS}


@pytest.mark.parametrize(("module", "arguments", "into"), COMMANDS, ids=lambda value: str(value))
def test_tables_are_those_of_the_records(module, arguments, into, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    # Expanded as a shell does: sorted, and a name without a pattern as it stands.
    words = [
        path
        for word in arguments
        for path in (sorted(str(found) for found in Path().glob(word)) if "*" in word else [word])
    ]
    assert importlib.import_module(f"fdk.bench.{module}").main(words) == 0
    text = (ROOT / into).read_text(encoding="utf-8")
    shown = text.partition(f"<!-- {module} -->\n")[2].partition(f"\n<!-- /{module} -->")[0]
    assert capsys.readouterr().out.strip() == shown.strip(), "run make figures"
