"""save_pretrained of a model with low-bit layers: its tensors go to the disk one at a time."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from fdk.errors import FormatError
from fdk.models.budget import parse_size
from fdk.models.card import write_card
from fdk.models.checkpoint import contents
from fdk.models.tensors import INDEX, SINGLE, TensorWriter

Revert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class SavePretrained:
    """A model's save_pretrained: transformers writes the configs, fdk the tensors and the model card.

    Beside the model it needs the canonical form of one layer at a time, where transformers would hold all tensors
    again, on the device of the model. All is written beside the files that it replaces, which then change places.

    It knows the model weakly, so that a model that is let go is gone at once. A second frame around the same modules
    stands in for it in `from_pretrained(...).save_pretrained(...)`, where nothing else holds the model any more.
    """

    def __init__(self, model: nn.Module, stand_in: nn.Module | None = None) -> None:
        self.model, self.stand_in = weakref.ref(model), stand_in

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        **kwargs,
    ) -> None:
        """As that of transformers; state_dict plays no part, as for every quantised model there."""
        model = self.model()
        model = self.stand_in if model is None else model
        if variant or kwargs.get("distributed_checkpoint") or getattr(model, "_hf_peft_config_loaded", False):
            settings = {"variant": variant, "save_peft_format": save_peft_format, "token": token, **kwargs}
            settings |= {"push_to_hub": push_to_hub, "max_shard_size": max_shard_size}
            return type(model).save_pretrained(model, save_directory, is_main_process, **settings)
        if not is_main_process:
            return None
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise FormatError(f"{folder} is a file; give a folder to save to")
        limit = max_shard_size if isinstance(max_shard_size, int) else parse_size(max_shard_size)
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        try:
            with model.hf_quantizer.without_tensors(), _no_bar():
                type(model).save_pretrained(model, work)
            (work / SINGLE).unlink(missing_ok=True)
            revert = (lambda tensors: revert_weight_conversion(model, tensors)) if save_original_format else dict
            write_tensors(model, work, limit, revert)
            write_card(work, model.config.quantization_config.to_dict())
            replace_files(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if push_to_hub:
            name = kwargs.pop("repo_id", folder.name)
            model.push_to_hub(name, token=token, max_shard_size=max_shard_size, **kwargs)

    def __reduce__(self) -> tuple:
        # A copy of the model gets one of its own.
        return SavePretrained, (self.model(),)


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the progress bar of transformers, which would count no tensors."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def write_tensors(model: nn.Module, folder: Path, limit: int, revert: Revert) -> None:
    """The tensors of `model` in files of at most `limit` bytes, under the names that `revert` gives them.

    revert: {name: tensor} of the modules to those of the checkpoint. What it makes of the tensors of one block does not
    depend on the others; ValueError if it does.
    """
    found = contents(model)
    blank = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in found.specs.items()}
    stored = revert(dict(blank))
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
    unchanged = all(stored.get(name) is tensor for name, tensor in blank.items())
    with TensorWriter(folder, specs, limit) as writer:
        for group in _groups(found.tensors, unchanged):
            for name, tensor in (group if unchanged else revert(group)).items():
                writer.write(name, tensor)
        writer.finish()


def _groups(tensors: Iterable[tuple[str, Tensor]], single: bool) -> Iterator[dict[str, Tensor]]:
    """Tensors that go through `revert` together: each alone, or those of one block of layers."""
    for _, group in groupby(tensors, lambda item: item[0] if single else _block(item[0])):
        yield dict(group)


def _block(name: str) -> str:
    """model.layers.7 of model.layers.7.mlp.up_proj.codes; nothing outside of blocks."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match[0] if match else ""


def replace_files(work: Path, folder: Path) -> None:
    """Move the files of `work` into `folder`, and remove what its previous model leaves behind."""
    new = sorted(work.iterdir(), key=lambda path: path.name)
    names = {path.name for path in new}
    for path in new:
        path.replace(folder / path.name)
    shards = re.compile(rf"{SINGLE.removesuffix('.safetensors')}-\d{{5}}-of-\d{{5}}\.safetensors")
    for path in list(folder.iterdir()):
        if path.name not in names and (path.name in (SINGLE, INDEX) or shards.fullmatch(path.name)):
            path.unlink()
