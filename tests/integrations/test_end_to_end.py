"""From training to tokens: train, quantise, save, load in a fresh process, generate what the dequantised model does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fdk
from fdk.models import tiny

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

PROMPT = "def __init__(self, "
COUNT = 40
FRESH = """
import fdk
import json, sys, torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert isinstance(model.model.layers[0].mlp.up_proj, fdk.nn.Linear)
prompt = torch.tensor([list(sys.argv[2].encode())])
settings = json.loads(sys.argv[3])
print(json.dumps([model.generate(prompt, **settings, **more)[0, prompt.shape[1]:].tolist()
                  for more in ({}, {"custom_generate": fdk.decode})]))
"""


@pytest.mark.slow
def test_from_training_to_tokens_in_a_fresh_process(tmp_path):
    course = replace(tiny.COURSES["tiny"], length=64, batch=8)
    trained = tiny.train(steps=400, course=course)
    tiny.save_dense(trained, tmp_path / "dense")
    # In float32 only the order of sums can differ, which does not change the most likely token of a trained model.
    config = fdk.FdkConfig(3, codebook="kmeans", dtype="float32", overrides={"down_proj": "int4_g64"})
    low = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    low.save_pretrained(tmp_path / "low")

    dense = low.dequantize()
    assert not any(isinstance(module, fdk.nn.Linear) for module in dense.modules())
    prompt = torch.tensor([list(PROMPT.encode())])
    greedy = {"max_new_tokens": COUNT, "do_sample": False}
    # A model that was trained for seconds repeats itself, unless it is told not to.
    varied = {**greedy, "repetition_penalty": 1.5}
    expected, plain = (
        dense.generate(prompt, **settings)[0, prompt.shape[1] :].tolist() for settings in (varied, greedy)
    )
    assert len(set(expected)) > 5

    def fresh(*command: str) -> str:
        run = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert json.loads(fresh("-c", FRESH, str(tmp_path / "low"), PROMPT, json.dumps(varied))) == [expected] * 2
    ids = map(str, prompt[0].tolist())
    command = ("-m", "fdk", "generate", str(tmp_path / "low"), "--ids", *ids, "--tokens", str(COUNT), "--device", "cpu")
    assert [int(token) for token in fresh(*command).split()] == plain
