"""The kernel benchmark, `python -m fdk.bench`: every number is gated on correctness and stands beside its ceilings.

command.py    flags, the loop over shapes, what is run and what is passed over
problems.py   cases: names, bytes, operations, which lines a run has
operands.py   the weight of a line, and what a provider makes of it
modes.py      the kernel benchmarks of MatGPTQ and int4matmul: sizes, formats, tables
providers.py  who can multiply: fdk, torch, bitsandbytes; each with its operands
peers.py      others' GPU kernels: tinygemm, humming, gemlite
warm.py       processes that compile before a run on a GPU, and find out what crashes
gate.py       the correctness check before a timing
timing.py     rounds, percentiles, ratios; CPU clock and CUDA graphs
roofline.py   ceilings measured in the same process: read and copy bandwidth, bf16 rate, streaming floor
floor.py      the streaming floor on a GPU, by fdk's kernel
weights_floor.py  that on a CPU, of the weights' own memory
runs.py       which records of many runs belong together
records.py    one flat JSON object a line, with everything needed to read it later
report.py     tables and progress
plots.py      figures from records
summary.py    the tables of speed of README.md and docs/results.md from records
quality.py    the README's table of quality from records
variants/     configurations of the CUDA kernels against each other, a command of its own
"""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark with command line arguments `argv`; returns the exit status."""
    from fdk.bench.command import main

    return main(argv)


__all__ = ["main"]
