"""Tensor-parallel layers on one process and on two: gloo on the CPU, NCCL on GPUs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fdk
from fdk import testing
from fdk.nn import ColumnParallelLinear, Linear

WORKER = Path(__file__).with_name("parallel_worker.py")


def run_processes(folder: Path, backend: str, world: int, seconds: float = 300) -> None:
    """Run `world` workers; AssertionError, with what each said, unless all end well in time. None outlives this."""
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    workers = []
    try:
        for rank, log in enumerate(logs):
            arguments = [sys.executable, str(WORKER), str(folder / "store"), str(rank), str(world), backend]
            with log.open("w") as file:
                workers.append(subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT))
        end = time.monotonic() + seconds
        # A worker whose peer has failed would wait for it until its collective times out.
        while any(worker.poll() is None for worker in workers) and time.monotonic() < end:
            if any(worker.poll() for worker in workers):
                break
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    told = "\n".join(
        f"rank {rank}, exit status {worker.returncode}:\n{log.read_text(errors='replace')}"
        for rank, (worker, log) in enumerate(zip(workers, logs, strict=True))
    )
    assert all(worker.returncode == 0 for worker in workers), told
    assert all("ok" in log.read_text().splitlines() for log in logs), told


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_processes_with_gloo(tmp_path, world) -> None:
    run_processes(tmp_path, "gloo", world)


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2])
def test_gpus_with_nccl(tmp_path, world) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, torch sees {torch.cuda.device_count()}")
    if not torch.distributed.is_nccl_available():
        pytest.skip("torch was built without NCCL")
    run_processes(tmp_path, "nccl", world)


def test_a_process_that_fails_is_shown_and_ends_the_others(tmp_path) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1, exit status -9") as failure:
        run_processes(tmp_path, "fails", 2)
    assert "rank 0, exit status 1" in str(failure.value) and "rank 0 fails" in str(failure.value)
    assert time.monotonic() - start < 60


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
