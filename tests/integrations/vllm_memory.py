"""Host memory while vLLM loads a model, in a process of its own; appends one record to a file.

    MALLOC_MMAP_THRESHOLD_=65536 python vllm_memory.py MODEL RECORDS.jsonl '{"warm": SMALL_MODEL, options of LLM ...}'

The threshold gives freed tensors back to the system at once, so that the peak is that of what was alive. Bytes:
peak       anonymous memory above what the process held before
packed     the low-bit layers' tensors
other      all other parameters
largest    the largest dense weight of a linear layer
dense      how many parameters as large as that are left in low-bit layers
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")


def anonymous() -> int:
    """Bytes of memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


class Peak(threading.Thread):
    """The largest anonymous memory, looked up a few hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value, self.done = anonymous(), False

    def run(self) -> None:
        while not self.done:
            self.value = max(self.value, anonymous())
            time.sleep(0.002)


def main() -> None:
    folder, records, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        raise SystemExit("set MALLOC_MMAP_THRESHOLD_=65536, which the C library reads when a process starts")
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    from fdk.bench.records import environment
    from fdk.integrations.vllm.linear import FdkLinearMethod

    if not torch.accelerator.is_available():
        # As vLLM's worker for CPUs has it.
        torch.accelerator.empty_cache = lambda: None

    def load(which: str, **extra):
        args = EngineArgs(model=which, dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True, **extra)
        config = args.create_engine_config()
        with set_current_vllm_config(config):
            ensure_model_parallel_initialized(1, 1)
            return get_model(vllm_config=config)

    warm = options.pop("warm")
    with tempfile.TemporaryDirectory() as rendezvous:
        init_distributed_environment(1, 0, f"file://{rendezvous}/store", 0, "gloo")
        load(warm, **options)
        gc.collect()
        before, peak = anonymous(), Peak()
        peak.start()
        model = load(folder, **options)
        peak.done = True
        peak.join()
    low = [m for m in model.modules() if isinstance(getattr(m, "quant_method", None), FdkLinearMethod)]
    packed = [parameter for module in low for parameter in module.parameters()]
    config = json.loads((Path(folder) / "config.json").read_text())
    largest = 2 * config["hidden_size"] * config["intermediate_size"]
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    held = sum(parameter.numel() * parameter.element_size() for parameter in packed)
    entry = {
        "test": "vllm_memory",
        "model": Path(folder).name,
        "options": json.dumps(options),
        "peak": peak.value - before,
        "packed": held,
        "largest": largest,
        "other": total - held,
        "dense": sum(p.numel() * p.element_size() >= largest for p in packed if p.is_floating_point()),
    }
    with records.open("a") as file:
        file.write(json.dumps(entry | environment(torch.device("cpu"))) + "\n")


if __name__ == "__main__":
    main()
