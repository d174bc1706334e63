"""fdk info: this machine, or the layers of a model folder."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

from fdk.cli.output import show
from fdk.errors import FdkError

HELP = "this machine, or the layers of a model folder"
OPTIONAL = ("safetensors", "numpy", "rich", "transformers", "huggingface_hub", "triton", "bitsandbytes", "matplotlib")


def add_flags(p: argparse.ArgumentParser) -> None:
    """The flags of its command line."""
    p.add_argument("folder", nargs="?", help="folder or cached id of a model; without it: machine and kernels")


def run(args: argparse.Namespace) -> int:
    """Run it. Returns the exit status."""
    return machine_info() if args.folder is None else folder_info(args.folder)


def machine_info() -> int:
    """Versions, CPU, CUDA and what each kernel can do here."""
    import torch

    import fdk
    from fdk import device, kernels
    from fdk.formats import parse
    from fdk.packing.layouts import Geometry

    facts: list[tuple[str, str]] = []
    facts.append(("fdk", f"{fdk.__version__}, Python {platform.python_version()}, torch {torch.__version__}"))
    found = {name: _version(name) for name in OPTIONAL}
    facts.append(("with", ", ".join(f"{name} {number}" for name, number in found.items() if number)))
    if missing := [name for name, number in found.items() if not number]:
        facts.append(("without", ", ".join(missing)))
    cpu = torch.device("cpu")
    total, free = device.memory(cpu)
    facts.append(
        (
            "CPU",
            f"{device.cpu_name()}, {device.cpu_count()} cores, {total / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free",
        )
    )
    facts.append(
        ("", f"has {', '.join(device.cpu_instruction_sets()) or 'none of the instruction sets that fdk uses'}")
    )
    if "cpu" in kernels.names():
        facts += _cpu_library()
    reason = device.why_no_cuda()
    facts += [("CUDA", f"none: {reason}")] if reason else [("CUDA", line) for line in device.cuda_devices()]
    for name, text in facts:
        print(f"{name:12} {text}")
    geometry = Geometry(parse("lut4_g64"), 4096, 4096, torch.bfloat16, (4096,))
    rows = []
    for where in ("cpu", *(() if reason else ("cuda",))):
        problem = kernels.Problem(1, geometry, torch.device(where))
        rows += [(where, name, _reason(name, problem) or "yes") for name in kernels.names()]
    print()
    show(("device", "kernel", "serves lut4_g64, m = 1, 4096 x 4096, bf16"), rows, left=3)
    return 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _reason(name: str, problem) -> str | None:
    from fdk import kernels

    try:
        return kernels.reason_against(kernels.kernel(name), problem)
    except FdkError as error:
        return str(error)


def _cpu_library() -> list[tuple[str, str]]:
    from fdk.kernels.cpu import info

    try:
        facts = info()
    except FdkError as error:
        return [("CPU library", f"none: {error}")]
    if facts["reason"]:
        return [("CPU library", f"none, so the reference runs: {facts['reason']}")]
    lines = [
        ("CPU library", f"{facts['library']}"),
        (
            "",
            f"runs {facts['isa']} on {facts['threads']} threads; FDK_CPU_ISA chooses among {', '.join(facts['isas'])}",
        ),
    ]
    return lines + ([("", str(facts["note"]))] if facts.get("note") else [])


def folder_info(name: str) -> int:
    """Layers, formats, memory and kernels of a model folder."""
    import torch

    from fdk.models.folder import OtherNames, open_source, resolve
    from fdk.models.inventory import COLUMNS, inventory, size_text, stored_bytes
    from fdk.models.skeleton import architecture, read_config
    from fdk.models.tensors import TensorFiles

    folder = resolve(name)
    config = read_config(folder)
    if "quantization_config" not in config:
        files = TensorFiles(folder)
        try:
            count = sum(parameter.numel() for parameter in open_source(folder).model.parameters())
        except OtherNames:
            count = sum(torch.Size(files.spec(tensor)[1]).numel() for tensor in files)
        what = f"dense {architecture(config, folder)}, {count:,} parameters, {size_text(stored_bytes(files))}"
        print(f"{folder}: {what}, not quantised")
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = inventory(folder, device)
    show([column.format(device=device.type) for column in COLUMNS], found.rows, left=3)
    print("\n".join([*found.kernels, found.decoding, found.summary]))
    return 0
