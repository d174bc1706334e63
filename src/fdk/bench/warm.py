"""Fill the caches of compiled kernels before a run on a GPU, by several processes at once, each on its own lines.

A kernel that kills its process here, or does not end, is then left out of the run that times.
`python -m fdk.bench.warm INDEX COUNT ARGUMENTS...` is such a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fdk.bench.command import Settings, Shape
from fdk.bench.problems import DTYPES, Line

COMPILES = ("fdk", "humming")
SECONDS = 150.0
DEVICE_ERROR = 3


def tasks(settings: Settings) -> list[tuple[Shape, Line]]:
    """Lines whose provider compiles kernels that it keeps on disk; slow ones apart, so that they spread evenly."""
    from fdk.bench.run import wanted_lines

    found = [
        (shape, line)
        for shape in settings.shapes
        for line in wanted_lines(settings, shape)
        if line.provider.partition(":")[0] in COMPILES
    ]
    return sorted(found, key=lambda task: task[1].provider, reverse=True)


def reasons(text: str, everything: list[tuple[Shape, Line]], ending: str) -> dict[tuple[Shape, Line], str]:
    """The task that a process's log begins and does not end, with the process's ending as the reason."""
    begun: int | None = None
    for row in text.splitlines():
        try:
            event = json.loads(row)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and "task" in event:
            begun = event["task"] if event["event"] == "start" else None
    return {} if begun is None else {everything[begun]: f"in a trial its process {ending}"}


def run(settings: Settings, seconds: float = SECONDS) -> dict[tuple[Shape, Line], str]:
    """Compile everything that the run needs; the lines that must not be tried again, with the reason."""
    everything = tasks(settings)
    count = min(settings.jobs, len(everything))
    # The processes share the cores, so none needs more than two compilers of its own.
    environment = {"HUMMING_MAX_PARALLEL_BUILD_WORKERS": "2", "OMP_NUM_THREADS": "1"} | os.environ
    excluded: dict[tuple[Shape, Line], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for index in range(count):
            path = Path(folder) / str(index)
            command = [sys.executable, "-m", "fdk.bench.warm", str(index), str(count), *settings.arguments]
            with path.open("w") as log:
                child = subprocess.Popen(command, stdout=log, stderr=subprocess.DEVNULL, env=environment)
            children.append((child, path))
        limit = time.monotonic() + seconds
        for child, path in children:
            try:
                status = child.wait(max(0.1, limit - time.monotonic()))
                ending = f"ended with status {status}"
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                ending = f"had not ended after {seconds:g} s"
            excluded |= reasons(path.read_text(), everything, ending)
    return excluded


def child(index: int, count: int, argv: list[str]) -> None:
    """Prepare and run once, for every m, the lines that fall to process `index`; a log line around each."""
    from fdk.bench.command import settings
    from fdk.bench.operands import Source
    from fdk.bench.providers import prepare

    chosen = settings(argv)
    for number, (shape, line) in enumerate(tasks(chosen)):
        if number % count != index:
            continue
        print(json.dumps({"task": number, "event": "start"}), flush=True)
        try:
            with torch.inference_mode():
                prepared = prepare(line, Source(line, shape.n, shape.k, chosen.device, chosen.seed))
                for m in chosen.ms:
                    x = torch.zeros(m, shape.k, dtype=DTYPES[line.dtype], device=chosen.device)
                    prepared.run(x, 0, x.new_empty(m, shape.n))
                if chosen.device.type == "cuda":
                    torch.cuda.synchronize()
        except Exception as error:
            # The run itself meets the same error and reports it, unless it has made the whole process useless.
            print(json.dumps({"error": str(error)}), flush=True)
            if "CUDA error" in str(error):
                sys.stdout.flush()
                os._exit(DEVICE_ERROR)
        print(json.dumps({"task": number, "event": "done"}), flush=True)


if __name__ == "__main__":
    child(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
