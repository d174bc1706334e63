"""The plugin of vLLM: quantisation methods `fdk` and `matgptq_quant`, through the entry point `vllm.general_plugins`.

vLLM calls `register` in every process, possibly more than once. Nothing of vLLM is patched.
"""

from __future__ import annotations

import logging
import os

from fdk.errors import UnsupportedError

log = logging.getLogger("fdk.vllm")


def register() -> None:
    """Make the methods known to vLLM. A vLLM that lacks an interface keeps running without them; the log names it."""
    try:
        from fdk.integrations.vllm.config import register_methods
    except UnsupportedError as error:
        log.error("the quantisation method fdk is not available: %s", error)
        return
    register_methods()
    if os.environ.get("FDK_VLLM_STOCK") == "1":
        from fdk.integrations.vllm.stock import register_kernel

        register_kernel()
