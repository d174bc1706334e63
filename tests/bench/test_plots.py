"""Figures from synthetic records: files appear, nothing is left half-written, errors name the remedy."""

import builtins
import json
from itertools import pairwise

import pytest

from fdk.bench import plots, records
from fdk.bench.problems import DENSE_BITS, activation_bytes, operations, weight_bytes
from fdk.formats import parse


def synthetic(provider, format, m, threads=2, n=4096, k=4096, status="ok", date="2026-11-20T10:00:00+00:00"):
    """A record whose time is 1.2 times the larger of bytes at 40 GB/s and operations at 400 GFLOP/s."""
    dense = format in DENSE_BITS
    moved = weight_bytes(format, n, k, "bf16") + activation_bytes(m, n, k, "bf16")
    floor = moved / 40e9
    seconds = 1.2 * max(floor, operations(m, k, n) / 400e9)
    bf16 = 1.2 * max(2 * n * k / 40e9, operations(m, k, n) / 400e9)
    return records.record(
        test=("mv" if m == 1 else "mm") + ("" if dense else "_lut8"), m=m, k=k, n=n, format=format, dtype="bf16",
        bits=DENSE_BITS[format] if dense else parse(format).bits, provider=provider, status=status, bytes_rw=moved,
        kernel="cpu" if provider == "fdk" else None, ops=operations(m, k, n), avg_time=seconds, time_p20=0.9 * seconds,
        time_p50=seconds, time_p80=1.1 * seconds, floor=floor, x_bf16=bf16 / seconds, x_floor=seconds / floor,
        read_fraction=floor / seconds, read_bandwidth=40e9, peak=4e11, threads=threads, date=date,
        device="a CPU, 2 cores",
    )  # fmt: skip


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def full(tmp_path):
    pytest.importorskip("matplotlib")
    entries = [synthetic("fdk", f"lut{bits}_g64", m) for bits in (1, 2, 3, 4, 8) for m in (1, 8, 64)]
    for m in (1, 8, 64):
        entries += [synthetic("torch-bf16", "bf16", m), synthetic("bitsandbytes-nf4", "nf4_g64", m)]
    return write(tmp_path / "full.jsonl", entries)


def test_every_figure_is_drawn_as_svg_and_png(full, tmp_path):
    folder = tmp_path / "new" / "figures"
    drawn = plots.draw([full], folder)
    names = {"roofline_4096x4096_t2", "speedup_4096x4096_t2", *(f"bits_4096x4096_t2_m{m}" for m in (1, 8, 64))}
    assert {path.name for path in drawn} == {f"{name}.{suffix}" for name in names for suffix in ("svg", "png")}
    assert {path.name for path in folder.iterdir()} == {path.name for path in drawn}
    assert all(path.stat().st_size > 2000 for path in drawn)
    text = (folder / "roofline_4096x4096_t2.svg").read_text()
    for expected in (
        "a CPU, 2 cores, 2 threads, 2026-11-20",
        "read 40.0 GB/s",
        "bf16 matmul 400 GFLOP/s",
        "fdk lut4_g64",
    ):
        assert expected in text


@pytest.fixture
def one(tmp_path):
    pytest.importorskip("matplotlib")
    return write(tmp_path / "one.jsonl", [synthetic("torch-bf16", "bf16", 1)])


def test_figures_are_the_same_each_time(one, tmp_path):
    first = [path.read_bytes() for path in plots.draw([one], tmp_path / "a") if path.suffix == ".svg"]
    second = [path.read_bytes() for path in plots.draw([one], tmp_path / "b") if path.suffix == ".svg"]
    assert first == second


def test_points_of_two_runs_or_of_two_widths_are_never_joined():
    entries = [synthetic("fdk", "lut4_g64", m) | {"id": run} for run in "ab" for m in (1, 8)]
    entries += [synthetic("humming", f"int{bits}_g64", m) | {"id": "b"} for bits in (4, 8) for m in (1, 8)]
    found = plots.series_of(entries)
    assert [*found] == [("fdk lut4_g64", "a"), ("fdk lut4_g64", "b"), ("humming int4", "b"), ("humming int8", "b")]
    assert all([entry["m"] for entry in group] == [1, 8] for group in found.values())


def test_the_caption_counts_runs():
    entries = [synthetic("fdk", "lut4_g64", 1) | {"id": run} for run in "ab"]
    assert plots.caption(entries).endswith("2026-11-20, 2 runs, a line for each")
    assert plots.caption(entries[:1]).endswith("2026-11-20")


def test_names_of_rows_do_not_run_into_each_other():
    assert plots.spaced([1]) == {1}
    assert plots.spaced([1, 8, 64]) == {1, 8, 64}
    assert plots.spaced([1, 8, 64, 96, 128, 192, 256, 384, 8192]) == {1, 8, 64, 128, 256, 384, 8192}
    assert plots.spaced([1, 384, 512, 768, 1024, 2048]) == {1, 384, 512, 1024, 2048}


def test_a_single_record_is_enough_for_a_roofline(one, tmp_path):
    assert {p.stem for p in plots.draw([one], tmp_path)} == {"roofline_4096x4096_t2"}


def test_labels_are_moved_apart_and_keep_their_order():
    placed = plots.spread_labels([0.5, 0.51, 0.1, 0.505], 0.05)
    assert sorted(range(4), key=placed.__getitem__) == [2, 0, 3, 1]
    ordered = sorted(placed)
    assert all(b - a >= 0.05 - 1e-6 for a, b in pairwise(ordered))


def test_main_draws_and_reports_what_it_wrote(one, tmp_path, capsys):
    assert plots.main([str(one), "--output-dir", str(tmp_path / "f")]) == 0
    assert "roofline_4096x4096_t2.svg" in capsys.readouterr().out


def test_nothing_to_draw_is_an_error_with_a_reason(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = write(tmp_path / "failed.jsonl", [synthetic("fdk", "lut4_g64", 1, status="failed")])
    assert plots.main([str(path)]) == 2
    assert "no record has a time to draw" in capsys.readouterr().err


def test_a_missing_file_is_an_error(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert plots.main([str(tmp_path / "no.jsonl")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_missing_matplotlib_is_named_with_the_remedy(tmp_path, monkeypatch, capsys):
    original = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    path = write(tmp_path / "one.jsonl", [synthetic("torch-bf16", "bf16", 1)])
    assert plots.main([str(path)]) == 2
    assert "pip install 'fused-dequantisation-kernels[plot]'" in capsys.readouterr().err
