"""Small models that the tests of this folder share."""

import pytest
import torch
from small_models import SIZES
from torch import nn

from fdk.models.llama import Llama, LlamaConfig

SMALL = LlamaConfig(**SIZES)


@pytest.fixture
def llama() -> Llama:
    torch.manual_seed(0)
    return Llama(SMALL).eval()


@pytest.fixture
def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32, bias=False)).eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
