"""A newer vLLM that has no CPU build: its Python beside the compiled operations of the build that is installed.

    python vllm_next.py WHEEL FOLDER

FOLDER then goes in front of the path, with VLLM_TARGET_DEVICE=cpu: `make test-vllm-next`.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile


def main() -> None:
    wheel, folder = sys.argv[1:]
    shutil.rmtree(folder, ignore_errors=True)
    with ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if not name.endswith(".so")])
    for compiled in Path(find_spec("vllm").origin).parent.glob("*.so"):
        shutil.copy(compiled, Path(folder) / "vllm")


if __name__ == "__main__":
    main()
