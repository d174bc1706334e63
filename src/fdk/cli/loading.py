"""A model folder as a model that predicts."""

from __future__ import annotations

from fdk.errors import FdkError


def load_model(folder, config: dict, device):
    """The model of a folder for decoding: a Llama by fdk alone, others by transformers."""
    import torch

    from fdk.models.checkpoint import load, quantisation_of
    from fdk.models.folder import load_dense
    from fdk.models.llama import ARCHITECTURE
    from fdk.models.room import folder_room
    from fdk.models.skeleton import architecture

    quantised = "quantization_config" in config
    if quantised:
        quantisation_of(config, folder)
    folder_room(folder, config, device)
    if architecture(config, folder) == ARCHITECTURE:
        return load(folder, device) if quantised else load_dense(folder, device, torch.bfloat16)
    try:
        from fdk.integrations.transformers import load_causal
    except ImportError as error:
        raise FdkError(
            f"{folder} holds a {architecture(config, folder)}, which transformers decodes: {error}"
        ) from None
    return load_causal(folder, device, torch.bfloat16)
