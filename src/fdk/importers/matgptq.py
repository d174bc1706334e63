"""MatGPTQ's checkpoints: nested 8-bit codes, as `data.pt` files a layer or packed into a Hugging Face folder.

unpacked   FOLDER/<layer>/data.pt = {qweight uint8 [n, k], scale [n, groups], zero, perm or None}
packed     safetensors with <layer>.qweight uint8 [n, k] and <layer>.scales [n, groups] in place of <layer>.weight;
           config.json: quantization_config = {quant_method "matgptq_quant", group_size, master_bitwidth,
           inference_bitwidth, modules_to_not_convert, quant_dtype}
mixed      text, a line `layer.name: bits` for every layer: what `fdk.set_precision` reads

The codes are those of nest8. Nothing is unpickled: a `data.pt` of more than tensors and plain values is refused.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fdk.arguments import check_tensors
from fdk.errors import FormatError, UnsupportedError
from fdk.formats import Format
from fdk.formats.registry import NEST
from fdk.formats.spec import MASTER_BITS
from fdk.models.precision import set_precision
from fdk.models.skeleton import CONFIG, build, fill_computed, persistent, read_config
from fdk.models.tensors import TensorFiles
from fdk.nn import Linear
from fdk.packing.bits import pack_planes, unpack_planes
from fdk.weight import QuantisedWeight

METHOD = "matgptq_quant"
MIDDLE = 1 << (MASTER_BITS - 1)
DATA = "data.pt"


def from_matgptq(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | float | None = None,
    perm: Tensor | None = None,
    bits: int = MASTER_BITS,
    group_size: int | None = None,
    name: str = "weight",
) -> QuantisedWeight:
    """The nested weight [n, k] of MatGPTQ's master codes, served at `bits`.

    qweight     uint8 [n, k]
    scale       [n, groups]; one scale per row may also be [n] or [1, n]
    zero        None or 128 everywhere: other zeros are refused, since slices round about the middle code
    perm        None or 0, 1, ..., k - 1: columns in another order (act-order) are refused
    group_size  checked against the scales if given; -1 is one scale per row

    FormatError or UnsupportedError, naming `name` and the value.
    """
    check_tensors(name, qweight=qweight, scale=scale)
    if perm is not None:
        check_tensors(name, perm=perm)
    if qweight.dtype != torch.uint8 or qweight.dim() != 2:
        raise FormatError(f"{name}: qweight must be uint8 [n, k], not {qweight.dtype} {list(qweight.shape)}")
    n, k = qweight.shape
    if scale.dim() == 1 or (scale.shape == (1, n) and n != 1):
        scale = scale.reshape(-1, 1)
    if scale.dim() != 2 or scale.shape[0] != n or not scale.shape[1] or k % scale.shape[1]:
        raise FormatError(
            f"{name}: scale must be [{n}, groups] with groups that divide k = {k}, not {list(scale.shape)}"
        )
    groups = scale.shape[1]
    expected = 1 if group_size in (None, -1) else k / group_size
    if group_size is not None and groups != expected:
        raise FormatError(
            f"{name}: scale has {groups} groups, but group_size = {group_size} and k = {k} ask for {expected:g}"
        )
    check_zeros(MIDDLE if zero is None else zero, name)
    if perm is not None and not torch.equal(perm.flatten().cpu().long(), torch.arange(k)):
        raise UnsupportedError(
            f"{name}: perm reorders the columns (act-order), which fdk does not import; quantise without act-order"
        )
    fmt = Format(NEST, MASTER_BITS, None if groups == 1 else k // groups, bits)
    parts = {"planes": pack_planes(qweight), "scales": scale.contiguous()}
    return QuantisedWeight.from_parts(fmt, k, parts, name=name)


def check_zeros(zero: Tensor | float, name: str) -> None:
    """UnsupportedError, naming the first other one, unless every zero is 128."""
    zeros = torch.as_tensor(zero)
    if (zeros != MIDDLE).any():
        other = zeros.flatten()[(zeros != MIDDLE).flatten()][0].item()
        raise UnsupportedError(
            f"{name}: zero holds {other:g}, but nested slices round about {MIDDLE}; "
            "fdk imports symmetric checkpoints only"
        )


def to_matgptq(weight: QuantisedWeight) -> dict[str, Tensor | None]:
    """Inverse of `from_matgptq`: {qweight, scale, zero, perm} as a `data.pt` holds them; FormatError unless nest8."""
    weight = weight.canonical()
    if weight.format.kind is not NEST:
        raise FormatError(f"{weight!r} has no form in MatGPTQ, whose codes are those of nest8")
    return {
        "qweight": unpack_planes(weight.parts["planes"], weight.shape[1]),
        "scale": weight.parts["scales"].clone(),
        "zero": torch.full_like(weight.parts["scales"], MIDDLE),
        "perm": None,
    }


def read_data(path: str | Path, bits: int = MASTER_BITS) -> QuantisedWeight:
    """The weight in a `data.pt` file, served at `bits`. FormatError for a file with code in it, or without qweight."""
    path = Path(path)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist; give the {DATA} of a layer") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise FormatError(f"{path} is damaged ({error}); copy it again") from None
    except Exception as error:
        # Its class lives in a module that this package does not import.
        if type(error).__name__ != "UnpicklingError":
            raise
        raise FormatError(
            f"{path} is no file of plain tensors, and fdk never runs pickled code; save tensors with torch.save"
        ) from None
    if not isinstance(stored, dict) or not {"qweight", "scale"} <= stored.keys():
        raise FormatError(f"{path} holds no qweight and scale; give the {DATA} that MatGPTQ writes for a layer")
    return from_matgptq(
        stored["qweight"], stored["scale"], stored.get("zero"), stored.get("perm"), bits, name=str(path)
    )


def read_unpacked(folder: str | Path, bits: int = MASTER_BITS) -> dict[str, QuantisedWeight]:
    """{layer: weight} of all `<layer>/data.pt` below a folder; FormatError if there is none."""
    folder = Path(folder)
    paths = sorted(folder.glob(f"*/{DATA}"))
    if not paths:
        raise FormatError(f"{folder} holds no <layer>/{DATA}; give the folder that MatGPTQ wrote its layers to")
    return {path.parent.name: read_data(path, bits) for path in paths}


def load_packed(
    folder: str | Path,
    device: torch.device | str | None = None,
    model: nn.Module | None = None,
    precision: int | str | Path | None = None,
) -> nn.Module:
    """The model in a packed folder, its layers nested, in evaluation mode.

    model       the modules to fill, dense, on any device or "meta"; needed unless fdk or transformers can build them.
    precision   width or text file of widths (`fdk.set_precision`); default: the folder's inference_bitwidth.

    FormatError or UnsupportedError, before anything is filled, for a folder of another tool, another master width than
    8, a layer without scales, or a tensor that is missing.
    """
    folder = Path(folder)
    config = read_config(folder)
    stored = _quantisation_of(config, folder)
    if model is None:
        model = build({key: value for key, value in config.items() if key != "quantization_config"}, folder)
    files = TensorFiles(folder)
    weights = {}
    for name in files:
        if name.endswith(".qweight"):
            layer = name.removesuffix(".qweight")
            if f"{layer}.scales" not in files:
                raise FormatError(f"{folder} lacks the tensor {layer}.scales; copy the whole folder again")
            scales = files.get(f"{layer}.scales")
            where = files.where(name)
            weights[layer] = from_matgptq(
                files.get(name), scales, files.get(f"{layer}.zeros") if f"{layer}.zeros" in files else None,
                bits=stored.get("inference_bitwidth") or MASTER_BITS, group_size=stored.get("group_size"), name=where,
            )  # fmt: skip
    _fill(model, files, weights, device)
    if precision is not None:
        set_precision(model, precision)
    return model.eval()


def _quantisation_of(config: dict, folder: Path) -> dict:
    stored = config.get("quantization_config")
    where = folder / CONFIG
    if not isinstance(stored, dict) or stored.get("quant_method") != METHOD:
        method = stored.get("quant_method") if isinstance(stored, dict) else None
        raise FormatError(f"{where}: quant_method is {method!r}, not {METHOD!r}; give a folder that MatGPTQ packed")
    if stored.get("master_bitwidth", MASTER_BITS) != MASTER_BITS:
        raise UnsupportedError(
            f"{where}: master_bitwidth is {stored['master_bitwidth']}, but fdk serves nested codes of 8 bits only"
        )
    return stored


def _fill(model: nn.Module, files: TensorFiles, weights: dict[str, QuantisedWeight], device) -> None:
    """Replace the layers of `weights` and read every other tensor, after all names have been checked."""
    modules = dict(model.named_modules())
    for layer, weight in weights.items():
        module = modules.get(layer)
        if not isinstance(module, nn.Linear) or (module.out_features, module.in_features) != tuple(weight.shape):
            raise FormatError(
                f"{files.folder}: layer {layer} {list(weight.shape)} is not a Linear of the model like it"
            )
    packed = {f"{layer}.weight" for layer in weights}
    dense = [entry for entry in persistent(model) if entry[0] not in packed]
    first: dict[int, str] = {}
    for name, _, _, tensor in dense:
        if name in files or id(tensor) not in first:
            first[id(tensor)] = name
    if missing := [name for name in first.values() if name not in files]:
        raise FormatError(f"{files.folder} lacks the tensor {missing[0]}; copy the whole folder again")
    read: dict[str, Tensor] = {}
    for _, module, own, tensor in dense:
        source = first[id(tensor)]
        if source not in read:
            value = files.get(source)
            read[source] = nn.Parameter(value if device is None else value.to(device), requires_grad=False)
        if own in module._parameters:
            module._parameters[own] = read[source]
        else:
            module._buffers[own] = read[source].detach()
    for layer, weight in weights.items():
        bias = modules[layer].bias
        here = weight if device is None else weight.to(device)
        model.set_submodule(layer, Linear(here, None if bias is None else bias.to(here.dtype)))
    fill_computed(model, None if device is None else torch.device(device))
