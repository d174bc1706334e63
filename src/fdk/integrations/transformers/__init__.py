"""fdk as a quantisation method of transformers: from_pretrained, on the fly or from a folder, and save_pretrained.

Importing this package registers the method "fdk" and imports transformers; `import fdk` does it as soon as transformers
is there. The folder is that of `fdk.save` (see models/checkpoint.py): the parts of a layer have its names, so that
transformers loads them without a conversion.
"""

from __future__ import annotations

try:
    from transformers.quantizers import auto

    from fdk.integrations.transformers.config import FdkConfig
    from fdk.integrations.transformers.decoding import decode, forget
    from fdk.integrations.transformers.folders import convert_folder, load_causal
    from fdk.integrations.transformers.quantiser import FdkQuantizer
except ImportError as error:
    raise ImportError(f"{error}; pip install 'fused-dequantisation-kernels[transformers]'") from None

from fdk.models.checkpoint import METHOD

if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
    auto.register_quantization_config(METHOD)(FdkConfig)
    auto.register_quantizer(METHOD)(FdkQuantizer)
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (FdkConfig,)

__all__ = ["FdkConfig", "FdkQuantizer", "convert_folder", "decode", "forget", "load_causal"]
