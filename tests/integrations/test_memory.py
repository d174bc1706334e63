"""Peak host memory of loading, saving and converting: the packed model and one tensor, never the dense model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import SIZES

from fdk.models import quantise_folder

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status, which only Linux has"),
]

LARGE = {
    **SIZES,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "head_dim": 128,
}
LAYERS = 7 * LARGE["num_hidden_layers"]
DENSE = 2048 * 4096 * 2
"""Bytes of the largest tensor in bfloat16."""
CHUNKS = 8 * 4 * (1 << 20)
"""Layers are quantised by chunks of 2^20 weights, of which a few exist in float32."""

# Prints the most anonymous memory during {action}, above what there was before, and the bytes of `model`.
PROBE = """
import sys, threading, time, torch
sys.path[:0] = {path!r}
import fdk, transformers
from fdk.models import quantise_folder
from transformers import AutoModelForCausalLM
load = AutoModelForCausalLM.from_pretrained
warm = load({small!r}, quantization_config=fdk.FdkConfig(4))
warm.save_pretrained({target!r} + "-warm")
quantise_folder({small!r}, {target!r} + "-converted", "lut4_g64")
source, target, model = {source!r}, {target!r}, None
{before}
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
most, done = 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.001)
start = anonymous()
thread = threading.Thread(target=watch)
thread.start()
{action}
done = True
thread.join()
tensors = [] if model is None else [*model.parameters(), *model.buffers()]
print(most - start, sum(t.nbytes for t in {{t.data_ptr(): t for t in tensors}}.values()))
"""


def write(folder: Path, sizes: dict) -> tuple[Path, int]:
    """A random model's folder, and the bytes of its linear layers."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder, sum(p.nbytes for name, p in model.named_parameters() if "proj" in name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("memory")
    dense, linear = write(folder / "dense", LARGE)
    assert linear > 500e6
    quantise_folder(dense, folder / "low", "lut4_g64")
    return {"small": write(folder / "small", SIZES)[0], "dense": dense, "low": folder / "low"}


def peak(folders: dict[str, Path], source: str, target: Path, action: str, before: str = "") -> tuple[int, int]:
    """Bytes above the start at the most during `action` in a new process, and those of its `model`."""
    names = {"small": str(folders["small"]), "source": str(folders[source]), "target": str(target)}
    code = PROBE.format(path=sys.path, action=action, before=before, **names)
    # Freed memory goes back at once, so that what is measured is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    most, packed = map(int, run.stdout.split())
    print(f"{action}: peak {most / 1e6:.0f} MB, model {packed / 1e6:.0f} MB")
    return most, packed


@pytest.mark.parametrize("source", ["dense", "low"])
def test_loading_takes_the_packed_model_and_one_dense_tensor(folders, tmp_path, source):
    settings = ", quantization_config=fdk.FdkConfig(4)" if source == "dense" else ""
    most, packed = peak(folders, source, tmp_path / "target", f"model = load(source{settings})")
    # Weights on a CPU start and end at pages of 2 MiB.
    assert most <= packed + DENSE + LAYERS * (2 << 20) + CHUNKS
    assert 100e6 < packed < 200e6


@pytest.mark.parametrize("shard", ["50GB", "20MB"])
def test_saving_takes_one_tensor(folders, tmp_path, shard):
    save = f"model.save_pretrained(target, max_shard_size={shard!r})"
    most, packed = peak(folders, "low", tmp_path / "target", save, "model = load(source)")
    # The canonical parts of one layer, and what making them takes.
    assert most <= DENSE + CHUNKS
    assert packed > 2 * (DENSE + CHUNKS)


def test_converting_a_folder_takes_one_tensor(folders, tmp_path):
    most, _ = peak(folders, "dense", tmp_path / "target", "quantise_folder(source, target, 'lut4_g64')")
    assert most <= DENSE + 2 * CHUNKS
