"""Kernel configurations against each other, `python -m fdk.bench.variants`: which one should be chosen on a GPU.

configurations.py  problems and the configurations to try on them: the chosen one and changes to its fields
named.py           named sets of both, with what they are expected to show
code.py            compiling them in parallel; registers, stack and instructions of the code
measure.py         checking and timing those of one problem in interleaved rounds
gpu.py             the products, floors and clocks that takes, on a CUDA device
worker.py          the process that does so
command.py         flags; the process that compiles, starts the worker, and outlives it; records and tables
"""


def main(argv: list[str] | None = None) -> int:
    """Run with command line arguments `argv`; returns the exit status."""
    from fdk.bench.variants.command import main

    return main(argv)


__all__ = ["main"]
