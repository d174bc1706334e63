"""A Llama with random weights, built and quantised a layer at a time: never dense as a whole."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from fdk.device import device_of
from fdk.models.llama import Llama, LlamaConfig
from fdk.models.skeleton import persistent
from fdk.nn.convert import Plan, Progress, plan_jobs, run_job
from fdk.nn.report import Report

DEVIATION = 0.02


def random_tensor(name: str, shape: torch.Size, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal values with standard deviation 0.02 that depend on the seed, name, shape and device alone."""
    generator = torch.Generator(device).manual_seed(seed ^ zlib.crc32(name.encode()))
    return torch.empty(shape, device=device, dtype=dtype).normal_(0, DEVIATION, generator=generator)


@torch.no_grad()
def random_llama(
    config: LlamaConfig,
    plan: Plan | None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Llama:
    """A random Llama quantised as `plan` says (None: dense), in evaluation mode, with its report as `fdk_report`."""
    device = device_of(device)
    model = Llama.skeleton(config)
    jobs, kept = plan_jobs(model, plan, meta=True) if plan else ([], {})
    report = Report(kept=kept, parameters=config.parameters)
    for done, job in enumerate(jobs, 1):
        for layer in job.layers.values():
            dense = random_tensor(f"{job.name}.weight", layer.weight.shape, seed, device, dtype)
            layer.weight = nn.Parameter(dense, requires_grad=False)
            if layer.bias is not None:
                layer.bias = nn.Parameter(torch.zeros(layer.out_features, device=device, dtype=dtype), False)
        modules, layer_report = run_job(job, device, dtype)
        for name, module in zip(job.layers, modules, strict=True):
            model.set_submodule(name, module)
        report.quantised += dense.numel()
        report.layers.append(layer_report)
        job.layers.clear()
        del layer, dense
        if progress:
            progress(layer_report, done, len(jobs))
    made: dict[int, nn.Parameter] = {}
    for name, module, own, tensor in list(persistent(model)):
        if not tensor.is_meta:
            continue
        if id(tensor) not in made:
            if tensor.dim() == 1:
                value = torch.full(tensor.shape, float(own == "weight"), device=device, dtype=dtype)
            else:
                value = random_tensor(name, tensor.shape, seed, device, dtype)
            made[id(tensor)] = nn.Parameter(value, requires_grad=False)
        module._parameters[own] = made[id(tensor)]
    model.fdk_report = report
    return model.eval()


def estimated_bytes(config: LlamaConfig, plan: Plan | None, dtype: torch.dtype = torch.bfloat16) -> int:
    """Memory of such a model, and of the largest dense tensor while it is built."""
    model = Llama.skeleton(config)
    jobs, _ = plan_jobs(model, plan, meta=True) if plan else ([], {})
    size = config.parameters * dtype.itemsize
    largest = 0
    for job in jobs:
        layer = next(iter(job.layers.values()))
        n, k = layer.out_features, layer.in_features
        size += job.recipe.format.nbytes(n, k, dtype.itemsize) - n * k * dtype.itemsize
        largest = max(largest, 2 * n * k * dtype.itemsize)
    return size + largest
