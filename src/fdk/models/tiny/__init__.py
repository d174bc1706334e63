"""Byte-level Llamas, trained in a minute on sources that every installation has: real models for real numbers."""

from __future__ import annotations

import json
import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fdk.errors import FdkError
from fdk.models.evaluate import Score, score
from fdk.models.llama import Llama, LlamaConfig
from fdk.models.skeleton import CONFIG as CONFIG_FILE
from fdk.models.tensors import TensorWriter, new_folder

HELD_OUT = 8
"""Every eighth file is kept for the evaluation."""


def _config(dim: int, inner: int, layers: int, heads: int, kv_heads: int, positions: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=dim,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim // heads,
        max_position_embeddings=positions,
        rope_theta=10000.0,
    )


@dataclass(frozen=True)
class Course:
    """A model's shape and how it is trained.

    length  bytes of a sequence;  batch  sequences of a step;  rate  peak of the learning rate.
    broad   whether the text is all of the standard library and torch, or the modules at the library's top only.
    """

    config: LlamaConfig
    length: int
    batch: int
    steps: int
    rate: float
    broad: bool


COURSES = {
    "tiny": Course(_config(128, 384, 3, 4, 2, 512), length=128, batch=16, steps=600, rate=4e-3, broad=False),
    "small": Course(_config(512, 1536, 8, 8, 4, 1024), length=512, batch=64, steps=800, rate=1e-3, broad=True),
}
"""tiny: 0.66 million parameters, a minute on two CPU cores. small: 25 million, 40 seconds on a large GPU."""

CONFIG = COURSES["tiny"].config


@cache
def corpus(broad: bool = False) -> tuple[Tensor, Tensor]:
    """(training, held-out) bytes, uint8, of Python sources, whole files each, in the order of their names.

    The modules at the top of this Python's standard library; broad: all of it but its tests, and torch's sources.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    if broad:
        files = [path for path in sorted(library.rglob("*.py")) if not _foreign(path.relative_to(library))]
        files += sorted(Path(torch.__file__).parent.rglob("*.py"))
    else:
        files = sorted(library.glob("*.py"))
    if len(files) < 2 * HELD_OUT:
        raise FdkError(f"the standard library's sources are not installed beside {library}")

    def text(paths: list[Path]) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8)

    held_out = files[HELD_OUT - 1 :: HELD_OUT]
    kept = set(held_out)
    return text([path for path in files if path not in kept]), text(held_out)


def _foreign(path: Path) -> bool:
    """Whether a file below the standard library is an installed package, or a test, which not every Python brings."""
    return bool({"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.parts))


def train(
    steps: int | None = None,
    seed: int = 0,
    course: Course = COURSES["tiny"],
    device: torch.device | str = "cpu",
    progress: Callable[[int, Tensor], None] | None = None,
) -> Llama:
    """The model after `steps` (the course's own) of AdamW, float32, seeded; on a GPU products are in bfloat16.

    progress: (step, loss), the loss still on the device.
    """
    device = torch.device(device)
    steps = steps or course.steps
    text = corpus(course.broad)[0].to(device)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llama(course.config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                size = 0.02 if parameter.shape[0] == 256 else parameter.shape[1] ** -0.5
                parameter.normal_(0, size, generator=generator)
    model.to(device)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    on_gpu = device.type == "cuda"
    optimiser = torch.optim.AdamW(groups, lr=course.rate, betas=(0.9, 0.95), fused=on_gpu or None)
    warm = max(1, steps // 20)
    for step in range(steps):
        rate = min(1.0, (step + 1) / warm) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = course.rate * rate
        starts = torch.randint(0, len(text) - course.length - 1, (course.batch, 1), generator=generator)
        window = text[(starts + torch.arange(course.length + 1)).to(device)].long()
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if progress:
            progress(step, loss.detach())
    return model.eval().requires_grad_(False)


def save_dense(model: Llama, folder: Path) -> Path:
    """Write `model` as a new folder in Hugging Face's layout, which `fdk eval` and `fdk quantise` read. Its path."""
    with new_folder(folder) as work:
        write_dense(model, work)
    return folder


def write_dense(model: Llama, folder: Path) -> None:
    """The same into a folder that is there."""
    state = model.state_dict()
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    with TensorWriter(folder, specs) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
        writer.finish()
    (folder / CONFIG_FILE).write_text(json.dumps(model.config.to_hf(), indent=1) + "\n", encoding="utf-8")


def held_out(sequences: int = 512, course: Course = COURSES["tiny"]) -> Tensor:
    """Windows [sequences, length + 1] spread evenly over the held-out text."""
    _, text = corpus(course.broad)
    starts = torch.linspace(0, len(text) - course.length - 2, sequences).long()
    return text[starts[:, None] + torch.arange(course.length + 1)].long()


def evaluate(model: Llama, sequences: int = 512, batch: int = 64) -> Score:
    """The tiny model's score on `sequences` stretches of 128 bytes spread evenly over the held-out text."""
    return score(model, held_out(sequences), batch=batch)
