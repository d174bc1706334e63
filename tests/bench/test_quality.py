"""The README's quality table from records."""

import json

import pytest

from fdk.bench import quality, summary


def record(format, bits, kl, codebook="uniform", note="", **more):
    common = {"test": "quality", "parameters": 25_400_000, "device": "NVIDIA H200", "date": "2026-11-21T10:00:00",
              "sequences": 256, "length": 512, "scale": "auto", "top1": 0.95, "perplexity_ratio": 1.01,
              "bits_per_weight": bits + 0.25, "perplexity": 2.0}  # fmt: skip
    return {**common, "format": format, "bits": bits, "codebook": codebook, "note": note, "kl": kl,
            "kl_low": 0.9 * kl, "kl_high": 1.1 * kl, **more}  # fmt: skip


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


ENTRIES = (
    record("bf16", 16, 0.0),
    record("lut4_g64", 4, 0.0075),
    record("lut4_g64", 4, 0.005, "kmeans"),
    record("lut2_g64", 2, 0.2, "kmeans"),
    record("nest8s2_g64", 2, 0.3),
    record("trunc8_g64", 8, 0.0001),
    record("lut_g64", 2, 0.15, "kmeans", "budget, calibrated"),
    record("nf4_g64", 4, 0.006),
    record("lut4_g64_sp16of32", 4, 0.12, "kmeans"),
)


def rows(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_widths_down_and_ways_across(tmp_path):
    text = quality.section(write(tmp_path / "q.jsonl", ENTRIES))
    head, _, *lines = rows(text)
    assert head[:5] == ["bits", "uniform table", "k-means table", "`nest8` slice", "`trunc8` slice"]
    assert head[5:] == ["k-means, widths by layer (calibrated)"]
    assert lines[:3] == [
        ["8", "", "", "", "0.100 +- 0.010", ""],
        ["4", "7.50 +- 0.75", "5.00 +- 0.50", "", "", ""],
        ["2", "", "200 +- 20", "300 +- 30", "", "150 +- 15"],
    ]
    assert lines[5:] == [
        ["`nf4_g64`", "4.25", "6.00 +- 0.60", "95.0", "1.0100"],
        ["`lut4_g64_sp16of32` k-means", "4.25", "120 +- 12", "95.0", "1.0100"],
    ]
    assert "25.4 million parameters" in text
    assert "perplexity 2.000 a byte" in text


@pytest.mark.parametrize(
    ("kl", "text"),
    [
        (0.0009, "0.900 +- 0.090"), (0.001, "1.00 +- 0.10"), (0.00999, "9.99 +- 1.00"), (0.01, "10.0 +- 1.0"),
        (0.0999, "99.9 +- 10.0"), (0.1, "100 +- 10"),
    ],
)  # fmt: skip
def test_three_digits_of_a_divergence(kl, text):
    assert quality.divergence(record("lut4_g64", 4, kl)) == text


def test_other_records_have_no_section(tmp_path):
    assert quality.section(write(tmp_path / "q.jsonl", [{"test": "decode"}])) == ""


def test_into_a_file_between_its_own_markers(tmp_path, capsys):
    records = write(tmp_path / "q.jsonl", ENTRIES)
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- quality -->\nold\n<!-- /quality -->\nb\n<!-- summary -->\nkept\n<!-- /summary -->\n")
    assert quality.main([str(records), "--into", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("a\n<!-- quality -->\n**Llama")
    assert text.endswith("\n<!-- /quality -->\nb\n<!-- summary -->\nkept\n<!-- /summary -->\n")
    assert "old" not in text
    readme.write_text("no markers")
    assert quality.main([str(records), "--into", str(readme)]) == 2
    assert "<!-- quality -->" in capsys.readouterr().err


def test_the_markers_of_the_speed_tables_are_as_before():
    text = "x\n<!-- summary -->\nold\n<!-- /summary -->\ny"
    assert summary.replace_between(text, "new") == "x\n<!-- summary -->\nnew\n<!-- /summary -->\ny"
