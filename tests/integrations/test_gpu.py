"""Models of transformers on a GPU: the graph beside their own forward, and from_pretrained where they are to run.

Few shapes, because every one is compiled, and no low-bit layer on the CPU: in a tree that is not built, the first one
compiles the CPU kernels, two minutes of a core.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fdk
from fdk.models.decode import LibraryStep, PlainStep, step_for
from fdk.models.step import Step

transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: transformers)")

pytestmark = pytest.mark.gpu

SIZES = {
    "vocab_size": 96,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": 0,
    "eos_token_id": 95,
}
IDS = torch.arange(14).view(2, 7)
BATCH, PROMPT, LENGTH = 3, 40, 256
"""`fdk.decode` rounds the length of its cache up to the same, so that it needs no other kernel for the attention."""


def write(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def follow(step, plain, tokens: torch.Tensor, mask: torch.Tensor | None = None, count: int = 16) -> None:
    """Both steps after the same tokens, for `count` tokens that the first one finds most likely."""
    step.prefill(tokens, mask)
    plain.prefill(tokens, mask)
    for _ in range(count):
        plain.tokens = step.tokens.clone()
        plain()
        step()
        # Both round every value to bfloat16 a few dozen times on the way, in another order.
        assert (step.logits - plain.logits).abs().max() <= 32 * 2.0**-8 * plain.logits.abs().max()


CASES = [("Llama", None), *((family, "lut4_g64") for family in ("Llama", "Mistral", "Qwen2", "Qwen3"))]


@pytest.mark.parametrize(("family", "fmt"), CASES)
def test_the_graph_follows_the_forward_of_transformers(tmp_path, family, fmt):
    model = transformers.AutoModelForCausalLM.from_pretrained(write(tmp_path / "source", family)).cuda()
    if fmt:
        fdk.quantise_(model, fmt)
    prompt = torch.randint(1, 95, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0)).cuda()
    step, plain = step_for(model, BATCH, LENGTH), step_for(model, BATCH, LENGTH, "plain")
    assert isinstance(step, Step) and isinstance(plain, LibraryStep)
    follow(step, plain, prompt)
    del step
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "custom_generate": fdk.decode}
    greedy, again = (model.generate(prompt, do_sample=False, **settings) for _ in range(2))
    assert greedy.shape == (BATCH, PROMPT + 12) and torch.equal(greedy, again)
    drawn = model.generate(prompt, do_sample=True, top_p=0.9, **settings)
    assert drawn.shape == (BATCH, PROMPT + 12)

    mask = (torch.arange(PROMPT) >= torch.tensor([0, 7, 39])[:, None]).long().cuda()
    with pytest.warns(UserWarning, match="without a CUDA graph: they are padded"):
        unfused = step_for(model, BATCH, LENGTH, mask=mask)
    assert isinstance(unfused, PlainStep)
    follow(unfused, plain, prompt * mask, mask, count=3)


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed (extra: transformers)")
def test_weights_are_quantised_where_they_are_to_run(tmp_path):
    load = transformers.AutoModelForCausalLM.from_pretrained
    config = fdk.FdkConfig(4, codebook="kmeans")
    low = load(write(tmp_path / "source", "Llama"), quantization_config=config, device_map="cuda")
    state = low.state_dict()
    assert {tensor.device.type for tensor in state.values()} == {"cuda"}
    low.save_pretrained(tmp_path / "low")
    for device_map in ("cuda", "auto"):
        again = load(tmp_path / "low", device_map=device_map)
        read = again.state_dict()
        assert read.keys() == state.keys() and all(torch.equal(tensor, read[name]) for name, tensor in state.items())
        assert again.generate(IDS.cuda(), max_new_tokens=3).shape == (2, 10)
    with torch.no_grad():
        compiled = torch.compile(low, fullgraph=True, backend="aot_eager")(IDS.cuda(), use_cache=False).logits
        assert torch.equal(compiled, low(IDS.cuda(), use_cache=False).logits)
