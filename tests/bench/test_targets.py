"""The tables of docs/targets.md tell what misses its target from what reaches it."""

import json
from pathlib import Path

import pytest

from fdk.bench import targets

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "results/nvidia_h200/kernels.jsonl"


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(tmp_path, entries):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.mark.parametrize(
    ("value", "target", "at_least", "met"),
    [
        (1.2, 1.2, False, True),
        (1.204, 1.2, False, True),
        (1.206, 1.2, False, False),
        (1.2, 1.2, True, True),
        (1.19, 1.2, True, False),
    ],
)
def test_figures_are_judged_as_they_are_shown(value, target, at_least, met):
    figure = targets.Figure("row", "column", value, target, at_least)
    assert figure.met == met
    assert ("**" in str(figure)) != met


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_slower_product_misses(tmp_path, factor):
    entries = records(KERNELS)
    for entry in entries:
        if (entry["provider"], entry["format"], entry["m"], entry["n"], entry["k"]) == (
            "fdk",
            "int4_g64",
            1,
            8192,
            8192,
        ):
            entry["x_floor"] *= factor
    text = targets.section(written(tmp_path, entries))
    line = next(line for line in text.splitlines() if line.startswith("| `int4_g64`"))
    head = next(line for line in text.splitlines() if line.startswith("| Time over the floor"))
    cell = dict(zip(head.split(" | "), line.split(" | "), strict=True))["m = 1, 8192 x 8192"]
    assert ("**" in cell) == (factor > 1), cell


def test_fp16_is_compared_with_cublas_in_fp16(tmp_path):
    entries = records(ROOT / "results/nvidia_h200/rows-fp16.jsonl")
    for entry in entries:
        entry["time_p50"] = 3e-4 if entry["provider"] == "torch-fp16" else 1e-4
        entry["x_bf16"] = 0.5
    # Of another run, which says nothing of this one.
    newer = [dict(e, id="newer", date="2099-01-01", time_p50=1.0) for e in entries if e["provider"] == "torch-fp16"]
    text = targets.section(written(tmp_path, entries + newer))
    assert "Time over cuBLAS fp16: 24 of 24" in text and "| 0.33 ≤ 1.02 |" in text


def test_faster_peer_is_a_miss(tmp_path):
    entries = records(KERNELS)
    for entry in entries:
        if entry["provider"] == "humming":
            entry["time_p50"] /= 100
    text = targets.section(written(tmp_path, entries))
    counts = [line for line in text.splitlines() if line.startswith("| Fastest peer")]
    assert counts and all(": 0 of " in line for line in counts)


def test_a_newer_run_hides_no_peer(tmp_path):
    entries = records(ROOT / "results/nvidia_h200/rows-humming.jsonl")
    older = [dict(entry, id="older", date="2026-01-01") for entry in entries if entry["provider"] != "fdk"]
    older += [
        dict(entry, id="older", date="2026-01-01", format=entry["format"].replace("lut", "int"))
        for entry in entries
        if entry["format"] == "lut3_g64"
    ]
    text = targets.section(written(tmp_path, older + entries))
    peers = text[text.index("humming over it") :]
    assert "| `lut3_g64` 8192 x 8192 |" in peers and "| `int3_g64` 8192 x 8192 |" in peers


def test_records_of_a_cpu_have_no_targets():
    assert targets.section(ROOT / "results/amd_zen4_4cores/kernels.jsonl") == ""
