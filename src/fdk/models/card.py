"""The model card of a quantised folder, README.md: how to load it, what was done, what it cost in accuracy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fdk.formats import parse
from fdk.models.tensors import read_json

CARD = "README.md"
_TEMPLATE = """---
library_name: transformers
tags:
- fdk
- quantised
---

# {name} in {formats}

{count} linear layers of this {architecture} hold {weights:,} weights in {bits:.3f} bits each, scales and tables
included; the files take {size:.3f} GB. Made by fdk {version} (`pip install fused-dequantisation-kernels`).

```python
import fdk  # registers the method "fdk"; without it transformers refuses this folder
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

`fdk generate FOLDER --prompt "..."` continues a text without Python, `fdk info FOLDER` lists the layers.

## Recipe

{recipe}

## Error of the layers

Signal to noise of the weights, SQNR = 10 log10(sum w^2 / sum (w - q)^2), against those they were made from.

| layers | format | number | bits a weight | least SQNR dB | mean SQNR dB |
| --- | --- | --- | --- | --- | --- |
{rows}
"""


def write_card(folder: Path, stored: Mapping) -> None:
    """Write the card of the folder, whose config and tensors are there already; `stored`: its quantization_config."""
    config = read_json(folder / "config.json")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    (folder / CARD).write_text(card(config, stored, size), encoding="utf-8")


def card(config: Mapping, stored: Mapping, size: int) -> str:
    """The card's text from config.json, quantization_config and the bytes of the files."""
    width = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    kinds: dict[tuple[str, str], list[Mapping]] = {}
    bits = weights = 0.0
    own = {name: entry for name, entry in stored["layers"].items() if "same_as" not in entry}
    for name, entry in own.items():
        kinds.setdefault((re.sub(r"\.\d+\.", ".*.", name), entry["format"]), []).append(entry)
        n, k = entry["shape"]
        bits += _bits(entry, width)
        weights += n * k
    rows = []
    for (name, fmt), entries in kinds.items():
        noise = [entry["sqnr_db"] for entry in entries if "sqnr_db" in entry]
        least, mean = (f"{min(noise):.1f}", f"{sum(noise) / len(noise):.1f}") if noise else ("-", "-")
        each = sum(_bits(entry, width) for entry in entries) / max(1, sum(_count(entry) for entry in entries))
        rows.append(f"| `{name}` | `{fmt}` | {len(entries)} | {each:.3f} | {least} | {mean} |")
    recipe = stored.get("recipe")
    architecture = (config.get("architectures") or [config.get("fdk_module", "model")])[0]
    return _TEMPLATE.format(
        name=Path(str(config.get("_name_or_path") or architecture)).name,
        formats=", ".join(dict.fromkeys(fmt for _, fmt in kinds)),
        count=len(own),
        architecture=architecture,
        weights=int(weights),
        bits=bits / max(1, weights),
        size=size / 1e9,
        version=stored["fdk_version"],
        recipe="\n".join(f"- {key}: `{value}`" for key, value in recipe.items()) if recipe else "Not recorded.",
        rows="\n".join(rows),
    )


def _count(entry: Mapping) -> int:
    n, k = entry["shape"]
    return n * k


def _bits(entry: Mapping, width: int) -> int:
    n, k = entry["shape"]
    tables, zeros = len(entry.get("row_ends", [n])), width if "zeros" in entry else 1
    return 8 * parse(entry["format"]).nbytes(n, k, width, tables, zeros)
