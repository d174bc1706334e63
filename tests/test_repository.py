"""The tree's own rules: import direction, a light import, no machine in the files, links and commands that work."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "fdk"

# Each part of the package imports only what stands in an earlier line. `fdk/__init__.py` gathers the public names, so
# whoever imports those imports all up to models. A `__main__.py` is a command: it may import everything.
LAYERS = (
    ("deferred", "errors"),
    ("arguments",),
    ("device",),
    ("formats",),
    ("packing",),
    ("quantise",),
    ("weight",),
    ("reference",),
    ("kernels",),
    ("ops",),
    ("nn",),
    ("models",),
    ("testing",),
    ("importers",),
    ("compat",),
    ("integrations",),
    ("bench",),
    ("cli",),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

IMPORT_BUDGET_MS = 60


def tracked_files() -> list[Path]:
    """Files under version control and new ones that are not ignored; all files without git, as in an sdist."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        return [p for p in ROOT.rglob("*") if p.is_file() and not {".venv", "__pycache__"} & set(p.parts)]
    return [path for path in (ROOT / name for name in names if name) if path.is_file()]


TRACKED = tracked_files()
SOURCES = [path for path in TRACKED if path.suffix == ".py" and PACKAGE in path.parents]
MARKDOWN = [path for path in TRACKED if path.suffix == ".md"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str | None:
    """The file's text, or None if it is binary."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def part_of(path: Path) -> str:
    """The part of the package a source belongs to: its folder or module under fdk, `cli` for a command."""
    return "cli" if path.name == "__main__.py" else path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(source: str) -> set[str]:
    """Parts of fdk that a source imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} imports relatively; write the full name"
            names = [f"fdk.{alias.name}" for alias in node.names] if node.module == "fdk" else [node.module]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            part = rest.split(".")[0]
            if package == "fdk":
                parts.add(part if part in RANK else "models")
    return parts


def imports_to_the_right(part: str, source: str) -> list[str]:
    """Parts that a source of `part` imports although they do not stand in an earlier line of LAYERS."""
    return sorted(other for other in imported_parts(source) - {part} if RANK[other] >= RANK[part])


def test_every_part_of_the_package_has_its_place():
    found = {part_of(path) for path in SOURCES} - {"__init__"}
    assert found, "no sources were found"
    assert found <= RANK.keys(), f"add {sorted(found - RANK.keys())} to LAYERS, where its imports allow"


@pytest.mark.parametrize("path", [path for path in SOURCES if part_of(path) != "__init__"], ids=relative)
def test_imports_point_to_the_left(path):
    wrong = imports_to_the_right(part_of(path), path.read_text(encoding="utf-8"))
    assert not wrong, f"{relative(path)} belongs to {part_of(path)}, which stands before {', '.join(wrong)}"


def test_the_import_check_finds_what_it_should():
    for code in (
        "import fdk.ops",
        "from fdk import ops",
        "from fdk.nn import Linear",
        "import fdk",
        "from fdk import linear",
    ):
        assert imports_to_the_right("weight", code), code
        assert imports_to_the_right("weight", f"def late():\n    {code}"), code
        assert not imports_to_the_right("cli", code), code
    assert not imports_to_the_right("weight", "import torch\nfrom fdk.formats import Format\nimport fdk.weight")


PROBE = """
import importlib, json, sys, time
import torch
events = []
def hook(name, arguments):
    if name in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        events.append([name, str(arguments[0])])
    elif name.startswith("socket."):
        events.append([name, str(arguments[1:])])
    elif name == "ctypes.dlopen" and any(lib in str(arguments[0]) for lib in ("cuda", "nvrtc", "_fdk")):
        events.append([name, str(arguments[0])])
sys.addaudithook(hook)
start = time.process_time()
import fdk
elapsed = time.process_time() - start
print(json.dumps({
    "ms": elapsed * 1e3,
    "events": events,
    "cuda": torch.cuda.is_initialized(),
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
}))
"""


@pytest.fixture(scope="module")
def import_probes():
    """`import fdk` after `import torch`, in fresh interpreters: a core's milliseconds, what it touched and loaded."""
    runs = [subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True) for _ in range(5)]
    for run in runs:
        assert run.returncode == 0, run.stderr
    return [json.loads(run.stdout) for run in runs]


def test_import_touches_no_gpu_compiler_or_network(import_probes):
    for probe in import_probes:
        assert probe["events"] == []
        assert not probe["cuda"]
        assert not {"matplotlib", "rich", "transformers", "triton", "vllm"} & set(probe["modules"])


def test_import_costs_little_above_torch(import_probes):
    # Other work on the machine only ever adds time, to that of a core too; so the least of several runs is the cost.
    least = min(probe["ms"] for probe in import_probes)
    assert least < IMPORT_BUDGET_MS, f"import fdk takes {least:.0f} ms above torch"


# A user's home, a scratch folder, or a package index: facts of one machine, which mean nothing on another.
MACHINE = re.compile(
    r"(?<![\w./~$}-])/(?:root|home|Users|work|workspace|mnt|opt|scratch)/[\w.-]+"
    r"|\bpypi\.org|pythonhosted|--(?:extra-)?index-url|--find-links|PIP_FIND_LINKS"
)


@pytest.mark.parametrize("path", [path for path in TRACKED if path != Path(__file__).resolve()], ids=relative)
def test_no_machine_in_the_files(path):
    text = text_of(path)
    found = MACHINE.search(text) if text else None
    line = text.count("\n", 0, found.start()) + 1 if found else 0
    assert found is None, f"{relative(path)}:{line} names {found.group()!r}, which exists on one machine only"


def test_the_machine_pattern_finds_what_it_should():
    for text in ("see /home/someone/x", "cache=/root/.cache", "'/work/main'", "pip --find-links y"):
        assert MACHINE.search(text), text
    for text in ("src/fdk/work/a", "https://example.org/home/a", "~/.cache/fdk", "$HOME/work/x", "read / write"):
        assert not MACHINE.search(text), text


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|<img[^>]*\bsrc=\"([^\"]+)\"")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def headings(markdown: str) -> list[tuple[int, str, str]]:
    """(level, text, anchor) of a Markdown text's headings, anchors made as GitHub makes them."""
    found, seen = [], Counter()
    for marks, text in re.findall(r"^(#+) +(.+?) *#*$", FENCE.sub("", markdown), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.append((len(marks), text, f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor))
        seen[anchor] += 1
    return found


def anchors(markdown: str) -> set[str]:
    """The anchors of a Markdown text's headings."""
    return {anchor for _, _, anchor in headings(markdown)}


def test_the_table_of_the_findings_leads_to_all_of_them():
    text = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    table = text[text.index("## Where to look") : text.index("## Decisions")]
    linked = {target for target, _ in LINK.findall(table)}
    reached: dict[str, bool] = {}  # sections, whether a link leads to them or into them
    for level, name, anchor in headings(text):
        if level == 2:
            section = name
        if level > 1:
            reached[section] = reached.get(section, section == "Where to look") or f"#{anchor}" in linked
    lost = [section for section, known in reached.items() if not known]
    assert not lost, f"docs/findings.md: the table under 'Where to look' has no link to {lost}"


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_relative_links_resolve(path):
    for match in LINK.finditer(FENCE.sub("", path.read_text(encoding="utf-8"))):
        link = match.group(1) or match.group(2)
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{relative(path)} links to {link}, which does not exist"
        assert target.is_dir() or target in TRACKED, (
            f"{relative(path)} links to {link}, which is not under version control"
        )
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{relative(path)}: no heading for {link}"


@pytest.mark.parametrize("path", MARKDOWN, ids=relative)
def test_make_commands_exist(path):
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    code = re.findall(r"^[ $]*make +([a-z][\w-]*)|`make +([a-z][\w-]*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    named = {first or second for first, second in code}
    assert named <= targets, f"{relative(path)} names make {sorted(named - targets)}, which the Makefile lacks"


def test_readme_names_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make bench" in readme
    assert "make test" in readme
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def unpickling(tree: ast.AST) -> list[str]:
    """Calls and imports in a syntax tree by which a pickle could be loaded, as 'line: what'."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                f"{node.lineno}: import {m}" for m in modules if m.split(".")[0] in ("pickle", "cloudpickle", "dill")
            ]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append(f"{node.lineno}: torch.load without weights_only=True")
            if keywords.get("allow_pickle", "False") != "False" or keywords.get("weights_only", "True") != "True":
                found.append(f"{node.lineno}: {name} may load a pickle")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_pickle_is_loaded(path):
    assert unpickling(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_pickle_check_finds_what_it_should():
    for code in ("import pickle", "from pickle import loads", "torch.load(f)", "torch.load(f, weights_only=False)"):
        assert unpickling(ast.parse(code)), code
    assert unpickling(ast.parse("numpy.load(f, allow_pickle=True)"))
    assert not unpickling(ast.parse("torch.load(f, weights_only=True); json.load(f)"))
