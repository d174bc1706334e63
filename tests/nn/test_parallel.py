"""Tensor-parallel layers on two processes: gloo on the CPU, NCCL on two GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fdk
from fdk import testing
from fdk.nn import ColumnParallelLinear, Linear

WORKER = Path(__file__).with_name("parallel_worker.py")


def run_processes(tmp_path: Path, backend: str, world: int = 2) -> None:
    arguments = [sys.executable, str(WORKER), str(tmp_path / "store")]
    workers = [
        subprocess.Popen(
            [*arguments, str(rank), str(world), backend], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(world)
    ]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0 and output.strip().endswith("ok"), output


@pytest.mark.slow
def test_two_processes_with_gloo(tmp_path) -> None:
    run_processes(tmp_path, "gloo")


@pytest.mark.gpu
def test_two_gpus_with_nccl(tmp_path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, torch sees {torch.cuda.device_count()}")
    run_processes(tmp_path, "nccl")


def test_without_a_process_group_the_error_says_what_to_call() -> None:
    layer = Linear(testing.random_weight(fdk.parse("lut4_g32"), 4, 32))
    with pytest.raises(fdk.FormatError, match="q_proj: no process group exists; call .*init_process_group"):
        ColumnParallelLinear.from_linear(layer, name="q_proj")


def test_a_shard_is_not_saved_as_if_it_were_the_layer(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        layer = Linear(testing.random_weight(fdk.parse("lut4_g32"), 4, 32))
        shard = ColumnParallelLinear.from_linear(layer)
        with pytest.raises(fdk.FormatError, match=r"the model is shard 0 of 1; save the whole model"):
            fdk.save(shard, tmp_path / "saved")
        with pytest.raises(fdk.FormatError, match="layer is a shard already"):
            ColumnParallelLinear.from_linear(shard)
    finally:
        torch.distributed.destroy_process_group()
