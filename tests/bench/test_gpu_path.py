"""The parts of the GPU path that need no GPU: operands, defaults, floors, chains, isolation, trial processes."""

import contextlib
import functools
import json
from types import SimpleNamespace

import pytest
import torch

from fdk.bench import command, floor, main, operands, records, roofline, run, summary, timing, warm
from fdk.bench.command import settings
from fdk.bench.problems import Line, Selection, lines
from fdk.errors import FdkError
from fdk.formats import parse
from fdk.packing.bits import unpack_codes
from fdk.reference import dequantise

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch):
    """A machine whose command line believes in a GPU; nothing is run on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("name", ["lut1_g64", "lut3_chan", "int4_g64", "int8_g64", "uint4_g64", "uint5_g16", "nf4_g64"])
def test_weights_drawn_on_the_device_are_valid_uniform_and_of_unit_norm(name):
    n, k = 96, 1024
    weight = operands.drawn_on_device(parse(name), n, k, torch.bfloat16, 1, CPU)
    codes = unpack_codes(weight.parts["codes"], weight.format.bits, k)
    counts = torch.bincount(codes.flatten().int(), minlength=1 << weight.format.bits).double()
    expected = n * k / len(counts)
    # Six standard deviations of a binomial count.
    assert (counts - expected).abs().max() < 6 * expected**0.5 + 1
    norm = dequantise(weight, torch.float64).square().sum(1).mean().sqrt()
    # E[s^2] of s uniform in [0.5, 1.5) is 13/12; uint's zeros and the scales of few groups scatter more.
    assert norm == pytest.approx((13 / 12) ** 0.5, rel=0.1)
    again = operands.drawn_on_device(parse(name), n, k, torch.bfloat16, 1, CPU)
    assert all(torch.equal(weight.parts[key], again.parts[key]) for key in weight.parts)


def test_spare_bits_of_drawn_codes_are_zero():
    weight = operands.drawn_on_device(parse("int3_chan"), 40, 37, torch.bfloat16, 0, CPU)
    assert not (weight.parts["codes"][:, -1] >> (37 * 3 % 8)).any()


def test_the_quick_run_on_a_gpu_has_the_shapes_and_formats_of_the_bars(cuda):
    found = settings(["--device", "cuda", "--quick"])
    assert [(s.n, s.k) for s in found.shapes] == [
        (4096, 4096), (8192, 8192), (14336, 4096), (4096, 14336), (28672, 8192),
    ]  # fmt: skip
    assert found.ms == (1, 8, 16, 32, 64)
    assert {line.format for line in lines(found.selection, 64) if line.provider == "fdk"} == set(command.QUICK_FORMATS)
    assert (found.inner, found.outer, found.peer_seconds) == (20, 30, 40.0)
    assert found.jobs >= 1


def test_a_long_run_on_a_gpu_keeps_the_defaults_of_the_source(cuda):
    found = settings(["--device", "cuda"])
    assert (found.inner, found.outer) == (100, 100)
    assert found.shapes == (command.Shape(4096, 4096, 64),)


def test_shapes_are_n_by_k():
    found = settings(["--device", "cpu", "--shapes", "128x64", "64x128"])
    assert [(s.n, s.k) for s in found.shapes] == [(128, 64), (64, 128)]


def test_peers_of_a_gpu():
    found = {(line.provider, line.format) for line in lines(Selection((16,), ("lut4_g64", "lut3_g64"), cuda=True), 64)}
    assert {
        ("torch-bf16", "bf16"), ("torch-tinygemm", "int4_g64"), ("bitsandbytes-nf4", "nf4_g64"),
        ("humming", "int4_g64"), ("humming", "int3_g64"), ("gemlite", "int4_g64"),
    } <= found  # fmt: skip
    assert not {"torch-int4pack", "torch-float32"} & {provider for provider, _ in found}


def test_a_chain_multiplies_what_the_call_before_returned():
    weights = [torch.full((1, 1), value) for value in (2.0, 3.0, 5.0)]
    seen = []

    def product(x, index, out):
        seen.append(x.item())
        return torch.matmul(x, weights[index], out=out)

    call = timing.chained(product, torch.ones(1, 1), 3)
    assert [call(i).item() for i in range(4)] == [2.0, 6.0, 30.0, 60.0]
    assert seen == [1.0, 2.0, 6.0, 30.0]
    assert call(0).item() == 2.0


@pytest.fixture
def fake_kernel(monkeypatch):
    """A streaming kernel in torch, and everything else of CUDA that the floor touches as nothing."""
    from fdk.kernels.cuda import jit, stream

    reads = []

    def read(data, out, grid=None, dependent=True):
        reads.append((data.data_ptr(), data.numel(), out.numel(), grid, dependent))

    monkeypatch.setattr(stream, "stream_floor", read)
    monkeypatch.setattr(jit, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(floor, "CudaBlock", timing.CpuBlock)
    return reads


def test_the_floor_reads_cold_windows_of_the_asked_size_with_and_without_pdl(fake_kernel):
    found = floor.GpuFloor(torch.zeros(1 << 20, dtype=torch.uint8))
    assert found.unavailable is None
    dependent, plain = found.calls(10_001, 64)
    assert found.grid(10_001, 64).startswith("fdk_stream ")
    fake_kernel.clear()
    for i in range(200):
        dependent(i)
    starts = [start for start, *_ in fake_kernel]
    assert len(set(starts)) == (1 << 20) // 12288
    assert all(b - a >= 10_016 for a, b in zip(sorted(set(starts)), sorted(set(starts))[1:], strict=False))
    assert {(size, n, pdl) for _, size, n, _, pdl in fake_kernel} == {(10_016, 64, True)}
    plain(0)
    assert fake_kernel[-1][-1] is False
    assert found.cold_calls(10_001) * 10_016 >= (1 << 20) // 2


def test_without_the_kernel_the_reason_is_kept(monkeypatch):
    from fdk.kernels.cuda import jit

    monkeypatch.setattr(jit, "unavailable", lambda: "no NVRTC")
    assert floor.GpuFloor(torch.zeros(1 << 16, dtype=torch.uint8)).unavailable == "no NVRTC"


def test_a_kernel_that_fails_later_makes_the_floor_unavailable(fake_kernel, monkeypatch):
    found = floor.GpuFloor(torch.zeros(1 << 20, dtype=torch.uint8))

    def broken(*arguments):
        raise RuntimeError("NVRTC failed\nlog")

    found.kernel = broken
    assert found.prepare([(4096, 64)]) == found.unavailable == "RuntimeError: NVRTC failed"


TINY = ["--device", "cpu", "-m", "1", "--inner-reps", "1", "--outer-reps", "2", "--threads", "1"]


def test_chains_and_both_floors_are_recorded(small, fake_kernel, monkeypatch, tmp_path, capsys):
    def memory(device):
        found = Memory(device)
        found.floor = floor.GpuFloor(found.pool)
        return found

    Memory = roofline.Memory
    monkeypatch.setattr(roofline, "Memory", memory)
    arguments = [*TINY, "--shapes", "128x128", "64x128", "-b", "16", "4", "--chain", "--output-dir", str(tmp_path)]
    assert main([*arguments, "--include", "^mv"]) == 0
    assert "in a chain: mv_lut8 lut4_g64 fdk" in capsys.readouterr().out
    for entry in records.read([tmp_path]):
        if entry["status"] != "ok":
            continue
        assert entry["floor_reader"].startswith("fdk_stream ")
        assert entry["floor"] > 0 and entry["floor_plain"] > 0
        assert (entry["chain_time"] is not None) == (entry["n"] == entry["k"])
        assert (entry["x_chain"] is not None) == (entry["n"] == entry["k"])


class FakeBlock:
    """Builds like a CudaBlock, and refuses the call that cannot run."""

    def __init__(self, call, inner, settle):
        call(0)
        self.inner = inner

    def __call__(self):
        return 1e-6


def test_a_call_that_fails_in_timing_leaves_the_others(monkeypatch):
    monkeypatch.setattr(timing, "CudaBlock", FakeBlock)

    def broken(i):
        raise ValueError("no such stream\nmore")

    chosen = SimpleNamespace(inner=20, outer=3, settle=0.0)
    device = SimpleNamespace(type="cuda")
    times, blocks, plan, failed = run.time_calls(
        {"0": lambda i: None, "1": broken, "read": lambda i: None}, chosen, 1.0, device, {"0": 170, "read": 2}
    )
    assert set(times) == set(blocks) == {"0", "read"}
    assert failed == {"1": "no such stream"}
    assert (plan.inner["0"], plan.inner["1"], plan.inner["read"]) == (170, 20, 2)
    with pytest.raises(ValueError, match="no such stream"):
        run.time_calls({"floor 0": broken}, chosen, 1.0, device, {})


def test_a_peer_that_compiles_for_too_long_is_left_out_and_ours_never():
    peers = run.Peers(10.0, spent={"humming": 11.0, "fdk": 99.0})
    shape = command.Shape(64, 64, 64)
    assert "more than the 10 s" in peers.reason_against(shape, Line("humming", "int", "int4_g64", "bf16"))
    assert peers.reason_against(shape, Line("fdk", "int", "int4_g64", "bf16")) is None
    line = Line("fdk", "lut8", "lut4_g64", "bf16")
    peers.excluded[shape, line] = "it crashed"
    assert peers.reason_against(shape, line) == "it crashed"


def test_what_a_trial_process_began_and_did_not_end_is_excluded():
    everything = ["a", "b", "c"]
    rows = [{"task": 0, "event": "start"}, {"task": 0, "event": "done"}, {"task": 2, "event": "start"}]
    text = "some library's greeting\n" + "\n".join(map(json.dumps, rows))
    assert warm.reasons(text, everything, "ended with status -11") == {
        "c": "in a trial its process ended with status -11"
    }
    ended = json.dumps({"task": 2, "event": "done"})
    assert warm.reasons(f"{text}\n{ended}", everything, "ended with status 0") == {}


def test_a_trial_process_runs_its_share_and_logs_it(small, capsys):
    arguments = [*TINY, "--shapes", "64x128", "-b", "4", "2", "--include", "^mv"]
    count = len(warm.tasks(settings(arguments)))
    assert count == 2
    warm.child(1, 2, arguments)
    events = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert events == [{"task": 1, "event": "start"}, {"task": 1, "event": "done"}]


class Fakes:
    """torch.cuda as far as CudaBlock uses it, with a log."""

    def __init__(self, monkeypatch, refuses=False):
        self.log = []
        stream = SimpleNamespace(synchronize=lambda: self.log.append("wait"), wait_stream=lambda other: None)
        event = lambda **_: SimpleNamespace(  # noqa: E731
            record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 6.0
        )

        @contextlib.contextmanager
        def capture(graph, stream):
            self.log.append("begin")
            if refuses:
                raise FdkError("not in a graph")
            yield
            self.log.append("end")

        monkeypatch.setattr(timing, "capture_stream", functools.cache(lambda device: stream))
        replacements = {
            "current_device": lambda: 0, "current_stream": lambda: None, "stream": lambda s: contextlib.nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")), "graph": capture,
            "Event": event, "synchronize": lambda: None,
        }  # fmt: skip
        for name, value in replacements.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_every_call_has_run_before_the_capture(monkeypatch):
    fakes = Fakes(monkeypatch)
    block = timing.CudaBlock(lambda i: fakes.log.append(i), 3)
    assert fakes.log == [0, 1, 2, "wait", "begin", 0, 1, 2, "end", "replay"]
    assert block() == pytest.approx(2e-3)
    assert block.launch == "graph"


def test_a_block_that_settles_is_timed_right_behind_its_own_replays(monkeypatch):
    fakes = Fakes(monkeypatch)
    block = timing.CudaBlock(lambda i: None, 3, settle=0.015)
    fakes.log.clear()
    assert block() == pytest.approx(2e-3)
    assert fakes.log == ["replay"] * 4


def test_a_call_that_cannot_be_captured_is_launched(monkeypatch):
    fakes = Fakes(monkeypatch, refuses=True)
    block = timing.CudaBlock(lambda i: fakes.log.append(i), 2)
    assert (block.launch, block.why_not_graph) == ("eager", "not in a graph")
    fakes.log.clear()
    block()
    assert fakes.log == [0, 1]


def test_an_error_of_the_device_ends_the_run_with_whole_records(small, monkeypatch, tmp_path, capsys):
    measure, points = run.measure_point, []

    def dying(*arguments):
        points.append(arguments[1])
        if len(points) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return measure(*arguments)

    monkeypatch.setattr(run, "measure_point", dying)
    arguments = [*TINY, "-m", "1", "2", "3", "-k", "128", "-n", "64", "-b", "16", "--output-dir", str(tmp_path)]
    assert main(arguments) == 1
    assert points == [1, 2]
    assert "stopped at m=2 k=128 n=64" in capsys.readouterr().out
    assert {entry["m"] for entry in records.read([tmp_path])} == {1}


def gpu_record(provider, format, m, n, k, seconds, date="2026-11-20T10:00:00+00:00"):
    return records.record(
        test="mv_int", m=m, n=n, k=k, format=format, bits=16 if format == "bf16" else parse(format).bits, dtype="bf16",
        provider=provider, status="ok", isa="sm_90", device="NVIDIA H200", time_p50=seconds, x_floor=1.25, x_bf16=4.5,
        floor=seconds / 1.25, floor_plain=seconds / 1.2, time_p20=seconds, time_p80=seconds, bytes_rw=n * k // 2,
        ops=2 * m * n * k, read_bandwidth=4e12, peak=8e14, date=date, id="cuda-1",
    )  # fmt: skip


@pytest.fixture
def gpu_file(tmp_path):
    entries = []
    for n, k in ((4096, 4096), (8192, 8192)):
        entries += [gpu_record("fdk", f"lut{bits}_g64", 1, n, k, bits * n * 1e-9) for bits in (1, 2, 4)]
        entries += [gpu_record("humming", f"int{bits}_g64", 1, n, k, bits * n * 2e-9) for bits in (1, 4)]
        entries.append(gpu_record("torch-bf16", "bf16", 1, n, k, 32e-6))
    path = tmp_path / "gpu.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_the_summary_of_a_gpu_has_a_table_for_every_m(gpu_file):
    text = summary.section(gpu_file)
    assert "| m = 1: us, x floor, x cuBLAS, x best peer of equal bits | 4096 x 4096 | 8192 x 8192 |" in text
    assert "| `lut4_g64` | 16.4, 1.25, 4.50, 2.00 | 32.8, 1.25, 4.50, 2.00 |" in text
    # No peer ran at 2 bits.
    assert "| `lut2_g64` | 8.2, 1.25, 4.50 | 16.4, 1.25, 4.50 |" in text
    assert "| cuBLAS bf16 | 32.0, 1.25 | 32.0, 1.25 |" in text
    assert text.index("`lut1_g64`") < text.index("`lut4_g64`") < text.index("cuBLAS bf16") and "humming" not in text


def test_a_brief_summary_has_one_row_of_activations_only(gpu_file, tmp_path):
    entries = [json.loads(line) for line in gpu_file.read_text().splitlines()]
    both = tmp_path / "both.jsonl"
    both.write_text("".join(json.dumps(entry | {"m": m}) + "\n" for entry in entries for m in (1, 16)))
    assert "| m = 16:" in summary.section(both)
    assert summary.section(both, brief=True) == summary.section(gpu_file).replace(gpu_file.as_posix(), both.as_posix())


def test_the_summary_of_many_rows_has_a_line_for_every_shape_and_provider(tmp_path):
    entries = []
    for m in (256, 1024):
        entries.append(gpu_record("fdk", "lut4_g64", m, 4096, 4096, m * 1e-6))
        entries.append(gpu_record("humming", "int4_g64", m, 4096, 4096, m * 2e-6))
        entries.append(gpu_record("torch-bf16", "bf16", m, 4096, 4096, 32e-6))
    path = tmp_path / "gpu.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    lines = summary.section(path).splitlines()
    assert lines[2] == "| x cuBLAS bf16 | m = 256 | m = 1024 |"
    assert [line.partition(" | ")[0] for line in lines[4:]] == [
        "| 4096 x 4096 `lut4_g64`",
        "| 4096 x 4096 humming `int4_g64`",
    ]


def test_figures_of_a_gpu(gpu_file, tmp_path):
    pytest.importorskip("matplotlib")
    from fdk.bench import plots

    drawn = {path.stem for path in plots.draw([gpu_file], tmp_path / "figures")}
    assert {"sizes_m1", "bits_4096x4096_m1", "bits_8192x8192_m1"} <= drawn
    text = (tmp_path / "figures" / "bits_8192x8192_m1.svg").read_text()
    assert text.count("humming int") == 1 and "floor, plain launches" in text
