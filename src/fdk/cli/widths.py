"""Widths by layer, as a budget of bits or bytes asks for them."""

from __future__ import annotations

import argparse
import math
from contextlib import ExitStack

from fdk.cli.flags import UsageError
from fdk.cli.output import progress_bar
from fdk.errors import FdkError


def chosen_widths(args: argparse.Namespace, config, device):
    """The widths that a budget asks for, or None if none was given."""
    from fdk.models.budget import parse_size
    from fdk.models.folder import resolve
    from fdk.models.skeleton import read_config
    from fdk.models.text import calibration_tokens

    if args.target_bits is None and args.max_memory is None:
        if args.widths or args.calibration or args.together:
            raise UsageError("--widths, --calibration and --together need a budget; add --target-bits or --max-memory")
        return None
    if args.target_bits is not None and args.max_memory is not None:
        raise UsageError("--target-bits and --max-memory are two budgets; give one")
    if args.target_bits is not None and not 0 < args.target_bits < math.inf:
        raise UsageError(f"--target-bits {args.target_bits}: a positive number of bits a weight is needed")
    if args.calibration_tokens < 1:
        raise UsageError(f"--calibration-tokens {args.calibration_tokens}: at least 1 is needed")
    if args.bits:
        raise UsageError("--bits has no meaning beside a budget, which chooses the widths; leave it out")
    if wrong := [bits for bits in args.widths or () if bits != 16 and not 1 <= bits <= 8]:
        raise UsageError(f"--widths {wrong[0]}: widths are 1 to 8 bits, and 16 for a layer that stays dense")
    try:
        size = None if args.max_memory is None else parse_size(args.max_memory)
    except FdkError as error:
        raise UsageError(f"--max-memory: {error}") from None
    folder = resolve(args.model)
    tokens = None
    if args.calibration:
        tokens = calibration_tokens(args.calibration, args.calibration_tokens, folder, read_config(folder), args.ids)
    budget = {"target_bits": args.target_bits, "max_bytes": size, "widths": args.widths, "together": args.together}
    return widths_of_folder(folder, config, tokens, device, **budget)


def widths_of_folder(folder, config, tokens, device, **budget):
    """`fdk.models.budget.choose_for_folder`, of any model that fdk or transformers reads, with a progress bar."""
    import torch

    from fdk.models.budget import choose_for_folder, choose_widths, sequences
    from fdk.models.folder import OtherNames

    with ExitStack() as stack:
        progress = progress_bar(stack, "measuring")
        try:
            return choose_for_folder(folder, config, tokens=tokens, device=device, progress=progress, **budget)
        except OtherNames:
            from fdk.integrations.transformers import load_causal

            model = load_causal(folder, device or torch.device("cpu"), config.dtype or torch.bfloat16)
            calibration = None if tokens is None else sequences(tokens)
            return choose_widths(model, config, calibration=calibration, progress=progress, **budget)
