"""The floor on a CPU reads the weights' own memory, as many bytes as a product does, copy after copy."""

import pytest
import torch

from fdk.bench import providers, weights_floor
from fdk.bench.problems import Selection, lines

CPU = torch.device("cpu")
N, K = 64, 1024


def addresses(views):
    return [(view.data_ptr(), view.numel() * 8) for view in views]


def test_words_are_the_tensors_own_memory():
    codes, scales = torch.zeros(4096, dtype=torch.uint8), torch.zeros(256, dtype=torch.bfloat16)
    views = weights_floor.words([codes, scales], 4096 + 512)
    assert addresses(views) == [(codes.data_ptr(), 4096), (scales.data_ptr(), 512)]


def test_a_view_into_a_storage_starts_where_its_tensor_does():
    part = torch.zeros(8192, dtype=torch.uint8)[1024:5120]
    assert addresses(weights_floor.words([part], 4096)) == [(part.data_ptr(), 4096)]
    transposed = torch.zeros(64, 32, dtype=torch.bfloat16).T
    assert addresses(weights_floor.words([transposed], 4096)) == [(transposed.data_ptr(), 4096)]


def test_no_more_is_read_than_a_product_reads():
    planes = torch.zeros(8192, dtype=torch.uint8)
    assert addresses(weights_floor.words([planes], 2048)) == [(planes.data_ptr(), 2048)]


def test_tables_are_not_read():
    codes, table = torch.zeros(1 << 16, dtype=torch.uint8), torch.zeros(1, 16, dtype=torch.bfloat16)
    assert len(weights_floor.words([codes, table], (1 << 16) + 32)) == 1


def test_calls_go_on_to_the_next_copy(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.Tensor, "sum", lambda view: seen.append(view.data_ptr()))
    copies = [[torch.zeros(4096, dtype=torch.uint8)] for _ in range(3)]
    call = weights_floor.stream(copies, 4096)
    for i in range(4):
        call(i)
    first = [copy[0].data_ptr() for copy in copies]
    assert seen == [*first, first[0]]


LINES = [
    *lines(Selection((16, 8, 4, 3, 1)), 64),
    *lines(Selection((16,), ("nest8s3_g128", "uint4_g64", "int4_g64_sp16of32", "nf4_g64")), 64),
]
LINES = list(dict.fromkeys(LINES))


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.provider}-{line.format}-{line.dtype}")
def test_every_provider_of_a_cpu_says_what_a_product_reads(line):
    prepared = providers.prepare(line, providers.Source(line, N, K, CPU, 0))
    prepared.copy_to(2)
    read = [weights_floor.words(prepared.tensors(index), prepared.weight_bytes) for index in range(2)]
    for views in read:
        # At most a table and what does not fill 64 bytes are left out.
        assert 0.97 * prepared.weight_bytes <= sum(view.numel() * 8 for view in views) <= prepared.weight_bytes
    assert not {view.data_ptr() for view in read[0]} & {view.data_ptr() for view in read[1]}
