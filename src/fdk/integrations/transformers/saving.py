"""save_pretrained of a model with low-bit layers."""

from __future__ import annotations

import weakref
from pathlib import Path

from torch import nn

from fdk.models.card import write_card


class SaveWithCard:
    """A model's save_pretrained, and after it the model card, for which transformers has no place.

    It knows the model weakly, so that a model that is let go is gone at once. A second frame around the same modules
    stands in for it in `from_pretrained(...).save_pretrained(...)`, where nothing else holds the model any more.
    """

    def __init__(self, model: nn.Module, stand_in: nn.Module | None = None) -> None:
        self.model, self.stand_in = weakref.ref(model), stand_in

    def __call__(self, save_directory, *args, **kwargs) -> None:
        model = self.model()
        model = self.stand_in if model is None else model
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_card(Path(save_directory), model.config.quantization_config.to_dict())

    def __reduce__(self) -> tuple:
        # A copy of the model gets one of its own.
        return SaveWithCard, (self.model(),)
