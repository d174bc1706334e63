"""Memory while vLLM loads a random Llama in bfloat16, in a process of its own; appends one record to a file.

    MALLOC_MMAP_THRESHOLD_=65536 python vllm_memory.py RECORDS.jsonl stored|quantised HIDDEN INTERMEDIATE LAYERS

stored: a folder of lut4_g64; quantised: a 16-bit folder, quantised to lut4_g64 with k-means tables while it is loaded.
The threshold gives freed tensors back to the system at once, so that the peak is that of what was alive. Bytes:

peak       anonymous memory above what the process held before
packed     the low-bit layers' tensors
other      all other parameters
largest    the largest dense weight of a linear layer
dense      how many parameters as large as that are left in low-bit layers

and of a GPU, where there is one, above what the process held before:

device_held  what torch's allocator has given out when the model is loaded
device_peak  the most that it had given out on the way
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

FORMAT = "lut4_g64"
ONLINE = {"quantization": "fdk", "additional_config": {"fdk": {"format": FORMAT, "codebook": "kmeans"}}}


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


def make(folder: Path, stored: bool, hidden: int, middle: int, layers: int) -> Path:
    """A random model, its low-bit form if it is to be stored so."""
    import transformers

    from fdk.models.folder import quantise_folder

    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    if not stored:
        return folder
    quantise_folder(folder, folder.with_name(folder.name + "-low"), FORMAT)
    return folder.with_name(folder.name + "-low")


def load(folder: Path, stored: bool):
    """The model as vLLM's loader makes it."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    options = json.loads(os.environ.get("FDK_TEST_VLLM", "{}")) | ({} if stored else ONLINE)
    args = EngineArgs(model=str(folder), dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True, **options)
    config = args.create_engine_config()
    with set_current_vllm_config(config):
        ensure_model_parallel_initialized(1, 1)
        return get_model(vllm_config=config)


def main() -> None:
    records, stored = Path(sys.argv[1]), sys.argv[2] == "stored"
    hidden, middle, layers = map(int, sys.argv[3:])
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        raise SystemExit("set MALLOC_MMAP_THRESHOLD_=65536, which the C library reads when a process starts")
    import torch
    from vllm.distributed import init_distributed_environment

    from fdk.bench.records import environment
    from fdk.integrations.vllm.linear import FdkLinearMethod

    on_gpu = torch.cuda.is_available()
    if not torch.accelerator.is_available():
        # As vLLM's worker for CPUs has it.
        torch.accelerator.empty_cache = lambda: None
    with tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "nccl" if on_gpu else "gloo")
        small = make(Path(folder) / "small", stored, 128, 256, 1)
        large = make(Path(folder) / "large", stored, hidden, middle, layers)
        load(small, stored)
        gc.collect()
        device_before = 0
        if on_gpu:
            torch.cuda.synchronize()
            device_before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        before, peak = anonymous(), Peak()
        peak.start()
        model = load(large, stored)
        peak.done = True
        peak.join()
    low = [module for module in model.modules() if isinstance(getattr(module, "quant_method", None), FdkLinearMethod)]
    packed = [parameter for module in low for parameter in module.parameters()]
    held = sum(parameter.numel() * parameter.element_size() for parameter in packed)
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    largest = 2 * hidden * middle
    entry = {
        "test": "vllm_memory",
        "stored": stored,
        "format": FORMAT,
        "hidden": hidden,
        "intermediate": middle,
        "layers": layers,
        "peak": peak.value - before,
        "packed": held,
        "other": total - held,
        "largest": largest,
        "dense": sum(p.numel() * p.element_size() >= largest for p in packed if p.is_floating_point()),
    }
    if on_gpu:
        gc.collect()
        torch.cuda.synchronize()
        entry["device_held"] = torch.cuda.memory_allocated() - device_before
        entry["device_peak"] = torch.cuda.max_memory_allocated() - device_before
    with records.open("a") as file:
        file.write(json.dumps(entry | environment(torch.device("cuda" if on_gpu else "cpu"))) + "\n")


if __name__ == "__main__":
    main()
