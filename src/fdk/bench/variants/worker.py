"""The process that checks and times on the GPU; what it does is told by lines of JSON, so that its end tells where.

`python -m fdk.bench.variants.worker JOB` is started by command.py. Lines: {"begin": NAME, "problem": I} before anything
of a variant runs ("" when none does), {"results": [...], "problem": I}, {"failed": TEXT, "problem": I}.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fdk.bench.variants.configurations import Problem, variants
from fdk.bench.variants.measure import Broken, Machine, measure

DEVICE_ERROR = 3


def work(job: dict, machine_of: Callable[[Problem], Machine], sms: int, say: Callable[[dict], None]) -> int:
    """Measure the problems of `job` from number `first` on; the exit status."""
    started = time.monotonic()
    todo = list(enumerate(job["problems"]))[job["first"] :]
    for done, (index, entry) in enumerate(todo):
        problem = Problem(**entry["problem"])
        excluded = job["excluded"].get(str(index), [])
        left = job["seconds"] - (time.monotonic() - started)
        deadline = time.monotonic() + max(0.0, left) / (len(todo) - done)

        def begin(name: str, index: int = index) -> None:
            say({"begin": name, "problem": index})

        begin("")
        try:
            wanted = [found for found in variants(problem, entry["changes"], sms) if found.name not in excluded]
            machine = machine_of(problem)
            results = measure(problem, wanted, machine, deadline, job["rounds"], begin)
        except Broken as error:
            say({"broken": str(error)})
            return DEVICE_ERROR
        except Exception as error:
            text = (str(error) or type(error).__name__).splitlines()[0]
            if "CUDA error" in text:
                say({"broken": text})
                return DEVICE_ERROR
            say({"failed": text, "problem": index})
            continue
        say({"results": results, "problem": index})
        del machine
        gc.collect()
    return 0


def main(path: str) -> int:
    """Do the job described in a file on the current CUDA device."""
    import torch

    from fdk.bench.floor import GpuFloor
    from fdk.bench.roofline import POOL_BYTES
    from fdk.bench.variants.gpu import Gpu

    job = json.loads(Path(path).read_text())
    device = torch.device("cuda", torch.cuda.current_device())
    pool = torch.empty(POOL_BYTES["cuda"], dtype=torch.uint8, device=device).fill_(0x3F)
    floor = GpuFloor(pool)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    with torch.inference_mode():
        return work(
            job,
            lambda problem: Gpu(problem, device, floor, job["chain"]),
            sms,
            lambda event: print(json.dumps(event), flush=True),
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
