"""python -m fdk.models.tiny: train the small Llama and print its perplexity for every width and codebook."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from fdk.bench import records
from fdk.models import QuantisationConfig, quantise
from fdk.models.__main__ import show_plain
from fdk.models.tiny import CONFIG, evaluate, train

COLUMNS = ("weights", "bits/weight", "perplexity", "excess loss (nats/byte)", "mean SQNR dB")


def main(argv: list[str] | None = None) -> int:
    """Train, quantise, evaluate; a table on the screen and records in the output folder."""
    p = argparse.ArgumentParser(prog="python -m fdk.models.tiny", description=__doc__)
    p.add_argument("--steps", type=int, default=600, help="training steps of 2048 bytes (600)")
    p.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2, 1], help="widths (8 4 3 2 1)")
    p.add_argument("--block-size", type=int, default=64, help="weights that share a scale (64)")
    p.add_argument("--scale", default="auto", help="auto, absmax, absmean or search (auto)")
    p.add_argument("--sequences", type=int, default=512, help="held-out sequences of 128 bytes (512)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output-dir", type=Path, default=Path("out"), help="folder for the records (out)")
    args = p.parse_args(argv)
    start = time.perf_counter()
    model = train(args.steps, seed=args.seed)
    seconds = time.perf_counter() - start
    environment = records.environment(torch.device("cpu"))
    print(f"{CONFIG.parameters:,} parameters, {args.steps} steps in {seconds:.0f} s")
    dense = quantise(model, None)
    score = evaluate(dense, args.sequences)
    base = {"test": "perplexity", "model": "tiny", "steps": args.steps, "seed": args.seed, "sequences": args.sequences}
    rows = [("bf16", "16", f"{score.perplexity:.3f}", "0", "")]
    with records.Writer(args.output_dir, f"tiny-{environment['id']}") as writer:
        writer.write({**base, "format": "bf16", "bits": 16, "perplexity": score.perplexity, **environment})
        for bits in args.bits:
            for codebook in ("uniform", "kmeans"):
                config = QuantisationConfig(bits, args.block_size, codebook=codebook, scale=args.scale)
                low = quantise(model, config)
                found = evaluate(low, args.sequences)
                excess, error = found.excess_over(score)
                report = low.fdk_report
                sqnr = sum(layer.error.sqnr_db for layer in report.layers) / len(report.layers)
                writer.write(
                    {
                        **base,
                        "format": str(config.format),
                        "bits": bits,
                        "codebook": codebook,
                        "scale": args.scale,
                        "bits_per_weight": report.bits_per_weight,
                        "perplexity": found.perplexity,
                        "excess_loss": excess,
                        "excess_error": error,
                        "mean_sqnr_db": sqnr,
                        **environment,
                    }
                )
                name, width = f"{config.format} {codebook}", f"{report.bits_per_weight:.3f}"
                rows.append((name, width, f"{found.perplexity:.3f}", f"{excess:+.4f} +- {error:.4f}", f"{sqnr:.1f}"))
    show_plain([COLUMNS, *rows])
    print(f"records: {writer.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
