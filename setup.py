"""Build of the CPU library: everything else about the package is in pyproject.toml.

The library has a plain C interface and is loaded with ctypes, so one wheel per platform serves every Python 3.
Sources and flags are those of src/fdk/kernels/cpu/build.py, which also builds at run time. Without a working compiler
the package is installed as pure Python, and says so.
"""

import importlib.util
import os
import re
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

BUILD = Path("src", "fdk", "kernels", "cpu", "build.py")


def load_cpu_build():
    """fdk.kernels.cpu.build by its path: importing fdk would need torch."""
    spec = importlib.util.spec_from_file_location("fdk_cpu_build", Path(__file__).resolve().parent / BUILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cpu_build = load_cpu_build()
MACHINE = os.environ.get("FDK_MACHINE")
"""The architecture to build a wheel for where it is not this one: FDK_MACHINE=aarch64 pip wheel ."""


def manylinux(library: Path, machine: str) -> str:
    """The platform tag of a library for Linux: by the newest version of glibc that it asks for."""
    versions = [int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())]
    return f"manylinux_2_{max([17, *versions])}_{machine}"


class PlatformDistribution(Distribution):
    """A distribution that belongs to one platform where there is a compiler to build the library with."""

    def has_ext_modules(self):
        return cpu_build.find_compiler(MACHINE) is not None


class BuildWithLibrary(build_py):
    """Copy the Python files, then put the library beside them.

    An editable install has it in the run-time cache instead, whose key holds the sources: there it cannot go stale.
    """

    def run(self):
        super().run()
        try:
            if self.editable_mode:
                cpu_build.LIBRARY.unlink(missing_ok=True)
                cpu_build.cached_library()
            else:
                self.library().unlink(missing_ok=True)
                cpu_build.build(self.library(), cpu_build.find_compiler(MACHINE), MACHINE)
        except cpu_build.BuildError as error:
            if MACHINE:
                raise SystemExit(f"fdk: no library for {MACHINE}: {error}") from None
            print(f"fdk: installing without the compiled CPU kernels: {error}")
            print("fdk: at run time they are built if a compiler is found then; otherwise plain torch is used")

    def library(self):
        """Where the library goes in a wheel."""
        return Path(self.build_lib, *BUILD.parent.parts[1:], cpu_build.LIBRARY.name)

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        return [*outputs, str(self.library())] if self.library().exists() else outputs


class PlatformWheel(bdist_wheel):
    """Tagged for any Python 3 on this platform, or for any platform if it holds no library."""

    def get_tag(self):
        library = self.get_finalized_command("build_py").library()
        if not library.exists():
            return "py3", "none", "any"
        return "py3", "none", manylinux(library, MACHINE) if MACHINE else super().get_tag()[2]


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": PlatformWheel},
)
