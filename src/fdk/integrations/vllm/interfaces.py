"""What the plugin uses of vLLM, all public, in one place; a missing name says which it is."""

from __future__ import annotations

import sys
from importlib import import_module

from fdk.errors import UnsupportedError

TRIED = "0.26, 0.32 and 0.33"


def _version() -> str:
    return getattr(sys.modules.get("vllm"), "__version__", "of unknown version")


def find(module: str, *names: str):
    """The first of `names` that `module` of vLLM has; UnsupportedError, naming it, if there is none."""
    try:
        found = import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            f"vLLM {_version()} has no module {module} ({error}), which fdk's plugin needs; it was tried with {TRIED}"
        ) from None
    for name in names:
        if hasattr(found, name):
            return getattr(found, name)
    raise UnsupportedError(
        f"vLLM {_version()} has no {module}.{' or '.join(names)}, which fdk's plugin needs; it was tried with {TRIED}"
    )


_LAYERS = "vllm.model_executor.layers"

LinearBase = find(f"{_LAYERS}.linear", "LinearBase")
LinearMethodBase = find(f"{_LAYERS}.linear", "LinearMethodBase")
UnquantizedLinearMethod = find(f"{_LAYERS}.linear", "UnquantizedLinearMethod")
ParallelLMHead = find(f"{_LAYERS}.vocab_parallel_embedding", "ParallelLMHead")
Experts = find(f"{_LAYERS}.fused_moe", "RoutedExperts", "FusedMoE")
UnquantizedExpertsMethod = find(f"{_LAYERS}.fused_moe", "UnquantizedFusedMoEMethod")
QuantizationConfig = find(f"{_LAYERS}.quantization.base_config", "QuantizationConfig")
METHODS = find(f"{_LAYERS}.quantization", "QUANTIZATION_METHODS")
register_quantization_config = find(f"{_LAYERS}.quantization", "register_quantization_config")
current_config = find("vllm.config", "get_current_vllm_config")
tensor_parallel_rank = find("vllm.distributed", "get_tensor_model_parallel_rank")
tensor_parallel_size = find("vllm.distributed", "get_tensor_model_parallel_world_size")
