"""Models that do not fit are refused before a tensor is read, with the widths that would."""

from __future__ import annotations

import json
import re

import pytest
import torch

import fdk
from fdk import cli
from fdk.errors import FdkError
from fdk.models import quantise, quantise_folder
from fdk.models.room import check_room, folder_room
from fdk.models.skeleton import read_config
from fdk.models.tensors import SINGLE, TensorWriter


@pytest.fixture
def source(llama, tmp_path):
    folder = tmp_path / "dense"
    folder.mkdir()
    state = llama.to(torch.bfloat16).state_dict()
    with TensorWriter(folder, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
        writer.finish()
    (folder / "config.json").write_text(json.dumps(llama.config.to_hf()))
    return folder


def with_free(monkeypatch, count: int) -> None:
    monkeypatch.setattr("fdk.device.memory", lambda device: (1 << 40, count))


def test_the_message_says_how_much_is_missing_and_what_fits(monkeypatch):
    with_free(monkeypatch, 1_000_000)
    shapes = [(1024, 1024)]
    check_room("m", 900_000, shapes, 0, torch.device("cpu"))
    # 6 bits and a scale of 16 bits for 64 weights: 819 kB; 7 bits would be 951 kB.
    with pytest.raises(FdkError, match=r"m needs 0.00 GB on cpu, .* at 6 bits a weight or fewer it would fit \(fdk"):
        check_room("m", 2_097_152, shapes, 0, torch.device("cpu"))
    with pytest.raises(FdkError, match=r"no width makes it fit, because 0.00 GB stay dense"):
        check_room("m", 2_097_152, shapes, 900_000, torch.device("cpu"))


def test_folders_are_weighed_by_their_headers(monkeypatch, tmp_path, llama, source):
    quantise_folder(source, tmp_path / "low", "lut4_g64")
    dense = sum(tensor.numel() for tensor in llama.state_dict().values()) * 2
    low = sum(tensor.nbytes for tensor in fdk.load(tmp_path / "low").state_dict().values())
    for folder, size in ((source, dense), (tmp_path / "low", low)):
        with_free(monkeypatch, int(size / 0.9) + 2)
        folder_room(folder, read_config(folder), torch.device("cpu"))
        with_free(monkeypatch, int(size / 0.9) - 2)
        with pytest.raises(FdkError, match="more than 90% of what is free") as error:
            folder_room(folder, read_config(folder), torch.device("cpu"))
        # What is advised fits: a little less room than the folder takes is enough for the next width.
        bits = int(re.search(r"--bits (\d)", str(error.value)).group(1))
        assert bits == (8 if folder == source else 3)
        advised = sum(tensor.nbytes for tensor in quantise(llama, f"lut{bits}_g64").state_dict().values())
        assert advised <= size


def test_generate_refuses_in_one_line(capsys, monkeypatch, source):
    with_free(monkeypatch, 100_000)
    assert cli.main(["generate", str(source), "--ids", "1", "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fdk generate: ") and "more than 90% of what is free there" in err and err.count("\n") == 1


def test_what_a_killed_conversion_left_is_cleared_away(tmp_path, source):
    low = tmp_path / "low"
    leftover = tmp_path / ".low.partial-0123abcd"
    leftover.mkdir()
    (leftover / SINGLE).write_bytes(b"half")
    quantise_folder(source, low, "lut4_g64")
    assert not leftover.exists()
    # Killed between the two renames of an overwrite: the old folder is put back.
    low.rename(tmp_path / ".low.replaced-0123abcd")
    with pytest.raises(FdkError, match="already exists"):
        quantise_folder(source, low, "lut2_g64")
    assert fdk.load(low).model.layers[0].mlp.up_proj.weight.format.bits == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "low"]
