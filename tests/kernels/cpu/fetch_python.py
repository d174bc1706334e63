"""Fetch a Python for aarch64 to run under emulation: Debian's packages, unpacked into a folder.

python fetch_python.py FOLDER leaves a root with usr/bin/python3 there (15 MB fetched), all at once or not at all, or
says why not, with exit status 1. apt gets lists of its own from the package sources of this machine, so that neither
root nor a foreign architecture in the system's lists is needed, and nothing is installed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("python3-minimal", "libpython3-stdlib")


def run(command: list[str], folder: Path, before: str = "") -> str:
    """What a command says; if it fails, that ends the script, with what was said before."""
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    said = before + done.stderr
    if done.returncode:
        raise SystemExit(
            f"no aarch64 Python: {command[0]} says: {' '.join(said.replace(str(folder), '').split())[:400]}"
        )
    return said


def main(target: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise SystemExit(f"no aarch64 Python: {tool} is not installed, which fetches it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        folder = Path(name)
        for part in ("state/lists/partial", "cache/archives/partial", "root"):
            (folder / part).mkdir(parents=True)
        (folder / "status").touch()
        options = {
            "Dir::State": folder / "state",
            "Dir::State::status": folder / "status",  # of a system on which nothing is installed
            "Dir::Cache": folder / "cache",
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Sandbox::User": "root",  # apt's own user may not enter this folder
            "Acquire::Languages": "none",
            "Acquire::http::Timeout": "20",
        }
        apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
        warnings = run([*apt, "update"], folder)  # a source without packages for arm64 is one
        run([*apt, "install", "--download-only", "--no-install-recommends", "-y", *PACKAGES], folder, warnings)
        root = folder / "root"
        for package in sorted((folder / "cache/archives").glob("*.deb")):
            run(["dpkg-deb", "-x", str(package), str(root)], folder)
        if not (root / "lib").exists():
            (root / "lib").symlink_to("usr/lib")  # comes with no package where /lib is a link
        try:
            root.rename(target)
        except OSError:
            # Another process of the tests has brought the same meanwhile.
            if not target.is_dir():
                raise


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
