"""Wheel and sdist as a user meets them: built without torch, installed into an environment of their own.

Three environments: an sdist and g++; a wheel and no compiler; neither compiler nor a wheel with the library. Where the
package is used, torch is lent by the environment that runs the tests; where it is built, there is no torch.
"""

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = ("g++", "as", "ld")
LIBRARY = "fdk/kernels/cpu/_fdk_cpu.so"
NOT_SOURCE = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", ".*", "build", "dist", "out")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="tells environments apart by PATH and .so, as on Linux"),
]


class Environment:
    """A virtual environment without pip or compiler: PATH holds the programs named and nothing else."""

    def __init__(self, folder: Path, programs: tuple[str, ...] = ()) -> None:
        venv.create(folder / "venv", with_pip=False)
        self.python = folder / "venv" / "bin" / "python"
        query = [self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        self.packages = Path(subprocess.check_output(query, text=True).strip())
        self.cache = folder / "cache"
        self.programs = folder / "programs"
        self.programs.mkdir()
        for program in programs:
            found = shutil.which(program)
            assert found, f"{program} is not on PATH; on Debian: apt-get install g++"
            (self.programs / program).symlink_to(found)
        kept = {name: value for name, value in os.environ.items() if name in ("LD_LIBRARY_PATH", "LANG", "TMPDIR")}
        self.variables = kept | {
            "PATH": str(self.programs),
            "HOME": str(folder),
            "FDK_CACHE_DIR": str(self.cache),
            "COLUMNS": "200",
        }

    def lend(self, *distributions: str) -> None:
        """Make single packages of the running environment importable here, and no others."""
        for path in site_packages():
            for name in distributions:
                for found in (*path.glob(name), *path.glob(f"{name}-*.dist-info")):
                    (self.packages / found.name).symlink_to(found)

    def lend_all(self) -> None:
        """Make all packages of the running environment importable, after those installed here."""
        # A path listed in a .pth file is not searched for further .pth files: an editable fdk stays out of sight.
        (self.packages / "lent.pth").write_text("".join(f"{path}\n" for path in site_packages()))

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
        """Run a command with this environment's Python; a failure fails the test with all that was printed."""
        done = subprocess.run(
            [str(self.python), *command], env=self.variables, cwd=cwd or self.programs, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done

    def pip(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run the test environment's pip for this environment, without an index."""
        command = [sys.executable, "-m", "pip", "--isolated", "--python", str(self.python), *arguments]
        offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--no-cache-dir"]
        done = subprocess.run([*command, *offline], env=self.variables, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done


def site_packages() -> list[Path]:
    """Folders that the running environment's packages lie in."""
    return [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree without anything that was built in it; nothing is built in the copy either."""
    target = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, target, ignore=NOT_SOURCE)
    return target


def build_environment(folder: Path, programs: tuple[str, ...] = ()) -> Environment:
    """An environment that holds setuptools and nothing else."""
    environment = Environment(folder, programs)
    environment.lend("setuptools", "_distutils_hack")
    return environment


def build_wheel(environment: Environment, source: Path, folder: Path) -> tuple[Path, str]:
    """The wheel built from an sdist or from a fresh copy of the tree, and what the build printed."""
    if source.is_dir():
        source = shutil.copytree(source, folder / "tree")
    done = environment.pip("wheel", "--verbose", "--wheel-dir", str(folder / "out"), str(source))
    (wheel,) = (folder / "out").iterdir()
    return wheel, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    """An sdist of the tree."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = shutil.copytree(source, folder / "tree")
    hook = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    build_environment(folder).run("-c", hook, str(folder / "out"), cwd=tree)
    (built,) = (folder / "out").iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel that an installer makes of the sdist where there is g++ and nothing else: the one real compilation."""
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(build_environment(folder, COMPILER), sdist, folder)[0]


@pytest.fixture(scope="module")
def pure_wheel(source, tmp_path_factory) -> tuple[Path, str]:
    """A wheel built from the tree where there is no compiler, and what the build printed."""
    folder = tmp_path_factory.mktemp("pure")
    return build_wheel(build_environment(folder), source, folder)


PRODUCT = """
import json
import torch
import fdk
from fdk import testing
from fdk.kernels import cpu

weight = testing.random_weight(fdk.parse("lut4_g64"), 96, 256)
x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
choice = fdk.explain(x, weight).choice
kernel = choice.kernel
wrong = testing.check_product(
    kernel.linear, x, weight.to_layout(kernel.layout), None, kernel.rounds_weights(choice.problem)
)
print(json.dumps({
    "package": fdk.__file__,
    "kernel": kernel.name,
    "wrong": str(wrong) if wrong else None,
    "rejected": dict(choice.rejected),
    "cpu": cpu.info(),
}))
"""


def product(environment: Environment) -> dict:
    """Multiply there with the kernel that is chosen, check the result, and say what was used."""
    facts = json.loads(environment.run("-c", PRODUCT).stdout)
    assert Path(facts["package"]).is_relative_to(environment.packages)
    assert facts["wrong"] is None
    return facts


def machine_has_avx2() -> bool:
    return "avx2" in Path("/proc/cpuinfo").read_text().split()


def assert_compiled_kernels_run(environment: Environment) -> None:
    facts = product(environment)
    assert facts["kernel"] == "cpu", facts["rejected"]
    assert Path(facts["cpu"]["library"]) == environment.packages / LIBRARY
    assert facts["cpu"]["isa"].startswith("avx") or not machine_has_avx2()
    assert not environment.cache.exists(), "the library was built again at run time"


def test_wheel_holds_library_and_sources(wheel, source):
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        required = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    assert LIBRARY in names
    expected = {path.relative_to(source / "src").as_posix() for path in (source / "src").rglob("*") if path.is_file()}
    assert names - {LIBRARY} - {name for name in names if ".dist-info/" in name} == expected
    assert {name.split(">")[0] for name in required if "extra ==" not in name} == {
        "torch",
        "numpy",
        "safetensors",
        "rich",
    }


def test_library_needs_neither_torch_nor_python_nor_openmp(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(LIBRARY, tmp_path)
    dynamic = subprocess.run(["readelf", "--dynamic", "--wide", library], capture_output=True, text=True, check=True)
    needed = {line.split("[")[1].split(".so")[0] for line in dynamic.stdout.splitlines() if "(NEEDED)" in line}
    assert needed <= {"libc", "libm", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}


def test_wheel_runs_the_compiled_kernels_without_a_compiler(wheel, tmp_path):
    environment = Environment(tmp_path)
    environment.pip("install", str(wheel))
    environment.lend_all()
    assert_compiled_kernels_run(environment)


def test_sdist_is_complete(sdist, source):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        path.relative_to(source).as_posix()
        for folder in ("src", "tests", "docs", "results")
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    assert expected <= names
    assert {"LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py"} <= names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}


def test_without_compiler_or_wheel_the_reference_runs_and_info_says_so(pure_wheel, tmp_path):
    built, printed = pure_wheel
    assert built.name.endswith("-py3-none-any.whl")
    assert "installing without the compiled CPU kernels: no C++ compiler found" in printed
    environment = Environment(tmp_path)
    environment.pip("install", str(built))
    environment.lend_all()
    facts = product(environment)
    assert facts["kernel"] == "reference"
    assert "no C++ compiler found" in facts["rejected"]["cpu"]
    said = environment.run(str(environment.python.parent / "fdk"), "info").stdout
    assert "no C++ compiler found" in said
    assert "reference" in said


def test_pure_wheel_builds_the_library_at_run_time_where_there_is_a_compiler(pure_wheel, wheel, tmp_path):
    environment = Environment(tmp_path, ("cp",))
    environment.pip("install", str(pure_wheel[0]))
    environment.lend_all()
    # A stand-in for the compiler, which has had its turn: its last argument is the output, as build.py passes it.
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(LIBRARY, tmp_path)
    program = environment.programs / "g++"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo stand-in && exit\nfor last; do :; done\ncp {library} "$last"\n'
    )
    program.chmod(0o755)
    facts = product(environment)
    assert facts["kernel"] == "cpu", facts["rejected"]
    assert Path(facts["cpu"]["library"]).is_relative_to(environment.cache)


def test_a_failing_compiler_does_not_fail_the_install(source, tmp_path):
    environment = build_environment(tmp_path)
    (environment.programs / "broken").write_text("#!/bin/sh\necho no such luck\nexit 1\n")
    (environment.programs / "broken").chmod(0o755)
    environment.variables["CXX"] = "broken"
    built, printed = build_wheel(environment, source, tmp_path)
    assert "installing without the compiled CPU kernels" in printed
    assert "no such luck" in printed
    assert built.name.endswith("-py3-none-any.whl")


STAND_IN = """#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done
echo 'needs GLIBC_2.17 and GLIBC_2.28' > "$out"
"""


def test_a_wheel_for_another_architecture_is_named_after_what_its_library_needs(source, tmp_path):
    environment = build_environment(tmp_path)
    compiler = environment.programs / "cross-g++"
    compiler.write_text(STAND_IN)
    compiler.chmod(0o755)
    environment.variables |= {"FDK_MACHINE": "aarch64", "FDK_AARCH64_CXX": str(compiler), "CXX": str(compiler)}
    built, _ = build_wheel(environment, source, tmp_path)
    assert built.name.endswith("-py3-none-manylinux_2_28_aarch64.whl")
    with zipfile.ZipFile(built) as archive:
        assert b"GLIBC_2.28" in archive.read(LIBRARY)


def test_a_wheel_for_another_architecture_is_not_built_without_its_compiler(source, tmp_path):
    """It was asked for by name, so that a wheel without kernels would not be what was meant."""
    environment = build_environment(tmp_path)
    environment.variables["FDK_MACHINE"] = "aarch64"
    with pytest.raises(AssertionError, match="no library for aarch64: no "):
        build_wheel(environment, source, tmp_path)
