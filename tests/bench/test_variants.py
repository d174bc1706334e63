"""Configurations against each other: what is tried, how it is compiled, and all of measuring it but the GPU."""

import json
import re
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from fdk import reference
from fdk.bench import timing
from fdk.bench.variants import code, command, gpu, main, measure, named, worker
from fdk.bench.variants.code import Code
from fdk.bench.variants.configurations import (
    CHOSEN,
    Problem,
    Variant,
    VariantError,
    changed,
    chosen,
    field_types,
    parse_changes,
    unfit,
    variants,
)
from fdk.kernels.cuda import decode_choice, decode_config, jit, prefill_choice

SMALL = Problem("decode", "lut4_g64", 512, 1024, 1)


def test_changes_are_all_combinations_of_their_lists():
    assert parse_changes(["stages=1,2", "late=1"], "decode") == [
        {"stages": 1, "late": True},
        {"stages": 2, "late": True},
    ]
    assert field_types("prefill")["tokens"] is int and field_types("prefill")["wide"] is bool
    assert "epilogue" not in field_types("decode")


@pytest.mark.parametrize("text", ["stage=1", "stages", "stages=", "stages=a", "stages=1,,2", "epilogue=1"])
def test_changes_that_make_no_sense_name_the_text(text):
    with pytest.raises(VariantError, match=re.escape(text.split("=")[0])):
        parse_changes([text], "decode")


def test_the_chosen_configuration_comes_first_and_no_configuration_twice():
    base = chosen(SMALL)
    found = variants(SMALL, [{"stages": base.stages}, {"late": not base.late}, {"late": not base.late}])
    assert [variant.name for variant in found] == [CHOSEN, f"late={int(not base.late)}"]
    assert found[0].config == base == decode_choice.choose_config(SMALL.shape, 1, 8, 132)
    many = Problem("prefill", "lut4_g64", 512, 1024, 128)
    assert chosen(many) == prefill_choice.choose(many.shape, 128, (8,), 132)


def test_another_cluster_takes_its_blocks_unless_they_are_named():
    wide = Problem("decode", "lut4_g64", 8192, 8192, 1)
    base = chosen(wide)
    assert changed(wide, base, {"cluster": 4}).blocks == -(-128 // decode_config.clusters_at_once(132, 4))
    assert changed(wide, base, {"cluster": 4, "blocks": 1}).blocks == 1
    with pytest.raises(VariantError, match="cluster=3"):
        changed(wide, base, {"cluster": 3})


def test_what_the_kernel_does_not_serve_is_said():
    for problem in (
        Problem("decode", "lut4_g64", 512, 1024, 65),
        Problem("prefill", "int4_g64_sp16of32", 512, 1024, 64),
        Problem("spread", "lut4_g64_sp16of32", 512, 1024, 64),
        Problem("spread", "int4_g64", 512, 1024, 64),
    ):
        with pytest.raises(VariantError, match="does not serve it"):
            chosen(problem)


def test_configurations_that_cannot_run_are_known_before_they_are_compiled():
    base = chosen(SMALL)
    assert unfit(SMALL, base) is None
    assert "shared memory" in unfit(SMALL, changed(SMALL, base, {"stages": 200}))
    assert "threads" in unfit(SMALL, changed(SMALL, base, {"k_warps": 16, "row_warps": 4, "stages": 1}))
    assert "tokens" in unfit(Problem("decode", "lut4_g64", 512, 1024, 2), base)


def test_every_named_set_has_configurations_that_may_run():
    for name, found in named.SETS.items():
        assert found.seconds > 0 and found.question
        for trial in found.trials:
            for problem in trial.problems:
                tried = variants(problem, trial.changes)
                assert len(tried) > 1, (name, problem)
                assert all(unfit(problem, variant.config) is None for variant in tried), (name, problem)


MANY = [
    Problem("prefill", "lut4_g64", 512, 1024, 64),
    Problem("spread", "int4_g64_sp16of32", 512, 1024, 64),
]
needs_nvrtc = pytest.mark.skipif(jit.unavailable() is not None, reason=jit.unavailable() or "")


@needs_nvrtc
@pytest.mark.parametrize("problem", [SMALL, *MANY], ids=lambda problem: problem.kernel)
def test_registers_and_stack_are_those_of_the_compiler(problem, tmp_path, monkeypatch):
    monkeypatch.setenv("FDK_CACHE_DIR", str(tmp_path))
    base = Variant(CHOSEN, chosen(problem))
    found = code.compile_one(problem, base, "sm_90a")
    _, log = jit.build(code.SOURCES[problem.kernel], code.defines(problem, base.config), "sm_90a")
    assert found.registers == int(re.search(r"Used (\d+) registers", log)[1])
    assert found.stack == int(re.search(r"(\d+) bytes stack frame", log)[1]) == 0
    assert found.reason is None


@needs_nvrtc
def test_registers_that_are_spilled_lie_on_the_stack(tmp_path, monkeypatch):
    monkeypatch.setenv("FDK_CACHE_DIR", str(tmp_path))
    problem = Problem("decode", "lut4_g64", 8192, 8192, 1)
    crowded = Variant("crowded", changed(problem, chosen(problem), {"k_warps": 16, "stage_units": 2, "min_ctas": 2}))
    assert code.compile_one(problem, crowded, "sm_90a").stack > 0


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("name", named.SETS)
def test_every_named_configuration_compiles_without_spills(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FDK_CACHE_DIR", str(tmp_path))
    tasks = command.compiled(named.SETS[name].trials, 132, "sm_90a", None)
    assert all(any(its.cubin for its in task.codes[1:]) for task in tasks)
    for task in tasks:
        for variant, its in zip(task.variants, task.codes, strict=True):
            # What does not compile is skipped with its reason: a change need not fit every problem of its trial.
            assert its.reason or its.stack == 0, (task.problem, variant.name, its.stack)


@needs_nvrtc
def test_what_does_not_compile_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("FDK_CACHE_DIR", str(tmp_path))
    wrong = changed(SMALL, chosen(SMALL), {"stage_units": 3, "stages": 1})
    found = code.compile_all([(SMALL, Variant("wrong", wrong)), (SMALL, Variant(CHOSEN, chosen(SMALL)))], "sm_90a")
    assert "does not compile" in found[0].reason and "slices are whole stages" in found[0].reason
    assert found[1].reason is None and found[1].cubin


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a0000017a02 */
        /*0010*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0020*/                   LDS R3, [R2] ;
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*0040*/              @!P0 BRA 0x30 ;
        /*0050*/                   LOP3.LUT R3, R3, 0xf80, RZ, 0xc0, !PT ;
        /*0060*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0070*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0080*/             @P1   BRA 0x20 ;
        /*0090*/                   STS [R2], R4 ;
        /*00a0*/             @!PT  BRA 0x10 ;
        /*00b0*/                   EXIT ;
"""


def test_the_main_loop_is_the_innermost_that_multiplies():
    assert [instruction.split()[0] for instruction in code.main_loop(SASS)] == [
        "LDS",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT",
        "BRA",
        "LOP3.LUT",
        "HMMA.16816.F32",
        "HMMA.16816.F32",
        "BRA",
    ]
    assert code.main_loop("") == []


def test_a_branch_back_into_the_loop_is_no_loop():
    rare = SASS.replace("EXIT ;", "EXIT ;\n        /*00c0*/  NOP ;\n        /*00d0*/  BRA 0x60 ;")
    assert code.main_loop(rare) == code.main_loop(SASS)


def test_a_loop_before_the_main_one_does_not_count():
    sums = SASS.replace("STS [R2], R4", "HMMA.16816.F32 R4, R4, R8, R4").replace("BRA 0x10", "BRA 0x90")
    assert [instruction.split()[0] for instruction in code.main_loop(sums)] == ["HMMA.16816.F32", "BRA"]


@needs_nvrtc
@pytest.mark.skipif(code.disassembler() is None, reason="needs cuobjdump")
@pytest.mark.parametrize("name, m, unit", [("lut4_g64", 1, 1), ("lut2_g64", 16, 2), ("lut1_g64", 1, 4)])
def test_units_of_the_main_loop_are_those_of_a_stage(name, m, unit, tmp_path, monkeypatch):
    monkeypatch.setenv("FDK_CACHE_DIR", str(tmp_path))
    problem = Problem("decode", name, 8192, 8192, m)
    base = Variant(CHOSEN, chosen(problem))
    assert base.config.stage_units == unit
    counts = code.instructions(code.compile_one(problem, base, "sm_90a").cubin)
    assert code.units_in_loop(problem, base, counts) == unit
    # A unit is 4096 weights; a lop3, a permute or a look-up serves four of a lane's at most.
    assert 4096 / 32 / 4 * unit < sum(counts.values()) < 1000 * unit


class Fake:
    """A device whose times are told to it, in microseconds by name; a text instead of a time is what is wrong."""

    def __init__(self, times: dict[str, object]) -> None:
        self.times, self.ran = times, []

    def check(self, variant):
        self.ran.append(variant.name)
        found = self.times[variant.name]
        if isinstance(found, Exception):
            raise found
        return found if isinstance(found, str) else None

    def blocks(self, variant):
        return {"": self._block(variant.name, 1e-6), measure.CHAIN: self._block(variant.name, 2e-6)}

    def references(self):
        return {name: self._block(name, 1e-6) for name in (measure.FLOOR, measure.CUBLAS)}

    def _block(self, name, unit):
        return lambda: self.times[name] * unit

    def facts(self):
        return {"copies": 3}


def tried(*names):
    return [Variant(name, chosen(SMALL)) for name in names]


def measured(times, names, deadline=1e9, clock=lambda: 0.0):
    fake = Fake(times | {measure.FLOOR: 5.0, measure.CUBLAS: 40.0})
    results = measure.measure(SMALL, tried(*names), fake, deadline, 9, clock=clock, pause=lambda seconds: None)
    return fake, {result["variant"] or result["who"]: result for result in results}


def test_variants_are_timed_beside_the_chosen_one_the_floor_and_cublas():
    _, found = measured({CHOSEN: 10.0, "stages=2": 8.0}, (CHOSEN, "stages=2"))
    faster = found["stages=2"]
    assert faster["time_p50"] == pytest.approx(8e-6) and faster["chain_time"] == pytest.approx(16e-6)
    assert (faster["x_chosen"], faster["x_floor"], faster["x_cublas"]) == pytest.approx((0.8, 1.6, 0.2))
    assert faster["rounds"] == 9 and faster["copies"] == 3 and faster["chain_x_chosen"] == pytest.approx(0.8)
    assert found[measure.FLOOR]["time_p50"] == pytest.approx(5e-6)


def test_a_wrong_variant_has_a_reason_and_no_time():
    _, found = measured({CHOSEN: 10.0, "a": "row 3 is wrong", "b": RuntimeError("no room\nmore")}, (CHOSEN, "a", "b"))
    assert (found["a"]["status"], found["a"]["reason"]) == ("failed", "row 3 is wrong")
    assert found["b"]["reason"] == "no room"
    assert "time_p50" not in found["a"] and "time_p50" in found[CHOSEN]


def test_an_error_of_the_device_ends_the_process():
    with pytest.raises(measure.Broken, match="CUDA error: an illegal"):
        measured({CHOSEN: 10.0, "a": RuntimeError("CUDA error: an illegal memory access")}, (CHOSEN, "a"))


def test_nothing_is_begun_after_the_deadline_but_three_rounds_are_timed():
    seconds = iter(range(100))
    fake, found = measured({CHOSEN: 10.0, "a": 1.0, "b": 1.0}, (CHOSEN, "a", "b"), 1.5, lambda: next(seconds))
    assert fake.ran == [CHOSEN, "a"]
    assert found["b"]["status"] == "skipped" and "--seconds" in found["b"]["reason"]
    assert found["a"]["rounds"] == 3


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(measure, "CLOCK_RECOVERS", 0.0)


class OnCpu(timing.CpuBlock):
    """A block timed on a CPU that says it is a CUDA graph."""

    graph, why_not_graph = object(), None


class ByDefinition:
    """A plan that multiplies by fdk's definition, and by the first weight's one only if told to be wrong."""

    wrong = ""

    def __init__(self, weight, config):
        self.weight, self.config, self.calls = weight, config, 0

    def __call__(self, x, bias, out):
        reference.linear(x, self.weight, bias, out)
        self.calls += 1
        if self.wrong == "value" or (self.wrong == "repeat" and self.calls == 5):
            out[0, -1] += 0.25


@pytest.fixture
def on_cpu(monkeypatch):
    """What gpu.Gpu takes of a GPU, done by a CPU."""
    monkeypatch.setattr(gpu, "KERNELS", {"decode": SimpleNamespace(Plan=ByDefinition)})
    monkeypatch.setattr(gpu.timing, "CudaBlock", OnCpu)
    monkeypatch.setattr(gpu, "copies_for", lambda *sizes: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    floor = SimpleNamespace(unavailable=None, calls=lambda size, n: (print, print), cold_calls=lambda size: 1)
    return lambda problem: gpu.Gpu(problem, torch.device("cpu"), floor, True)


@pytest.mark.parametrize("name", ["lut4_g64", "int4_g64_sp16of32", "nest8s4_g64"])
def test_operands_of_a_problem_are_checked_and_timed(name, on_cpu, no_pause, capsys):
    problem = Problem("decode", name, 128, 128, 2)
    results = measure.measure(problem, variants(problem, []), on_cpu(problem), 1e9, 3, clock=lambda: 0.0)
    assert [(result["variant"] or result["who"], result["status"]) for result in results] == [
        (CHOSEN, "ok"),
        (measure.FLOOR, "ok"),
        (measure.CUBLAS, "ok"),
    ]
    assert results[0]["chain_time"] > 0 and results[0]["copies"] == 3


def test_short_products_share_a_replay_with_many_others():
    large, many = Problem("decode", "lut2_g64", 8192, 8192, 1), Problem("prefill", "lut4_g64", 8192, 8192, 4096)
    assert gpu.calls_in_block(large, 18_900_000) == gpu.MOST_CALLS
    assert gpu.calls_in_block(many, 35_700_000) == gpu.FEWEST_CALLS


@pytest.mark.parametrize("wrong, text", [("value", "bound"), ("repeat", "of 20 repeated products differ")])
def test_wrong_products_are_found(wrong, text, on_cpu, monkeypatch):
    monkeypatch.setattr(ByDefinition, "wrong", wrong)
    assert text in on_cpu(SMALL).check(variants(SMALL, [])[0])


def job(*entries, **more):
    problems = [{"problem": problem.__dict__, "changes": []} for problem in entries]
    return {"problems": problems, "first": 0, "excluded": {}, "seconds": 100.0, "rounds": 3, "chain": False} | more


def test_a_worker_goes_on_behind_a_problem_that_fails(no_pause):
    unserved = Problem("decode", "lut4_g64", 512, 1024, 65)
    said = []
    times = {CHOSEN: 10.0, measure.FLOOR: 5.0, measure.CUBLAS: 40.0}
    assert worker.work(job(unserved, SMALL), lambda problem: Fake(times), 132, said.append) == 0
    assert any("does not serve it" in event.get("failed", "") for event in said)
    results = [event for event in said if "results" in event]
    assert [event["problem"] for event in results] == [1]
    json.dumps(said, allow_nan=False)


def test_a_worker_whose_device_is_broken_says_so_and_ends(no_pause):
    said = []
    times = {CHOSEN: RuntimeError("CUDA error: misaligned address")}
    status = worker.work(job(SMALL, SMALL), lambda problem: Fake(times), 132, said.append)
    assert status == worker.DEVICE_ERROR
    assert said[-1] == {"broken": "CUDA error: misaligned address"}
    assert {"begin": CHOSEN, "problem": 0} in said


def test_a_worker_leaves_out_what_ended_another(no_pause):
    said = []
    times = {measure.FLOOR: 5.0, measure.CUBLAS: 40.0}
    worker.work(job(SMALL, excluded={"0": [CHOSEN]}), lambda problem: Fake(times), 132, said.append)
    assert [result["who"] for event in said for result in event.get("results", [])] == [measure.FLOOR, measure.CUBLAS]


# A worker whose variant "stages=2" crashes, "stages=3" hangs, and whose problem number 1 fails as a whole.
CRASHING = """
import json, os, sys, time
job = json.load(open(sys.argv[1]))
say = lambda **event: print(json.dumps(event), flush=True)
for index in range(job["first"], len(job["problems"])):
    out = job["excluded"][str(index)]
    if index == 1:
        os._exit(7)
    for name in ("chosen", *(f"stages={change['stages']}" for change in job["problems"][index]["changes"])):
        if name in out:
            continue
        say(begin=name, problem=index)
        if name == "stages=2":
            say(broken="CUDA error: an illegal memory access")
            os._exit(3)
        if name == "stages=3":
            time.sleep(60)
    say(begin="", problem=index)
    print("a line of something else", flush=True)
    say(results=[dict(who="fdk", variant="chosen", status="ok", reason=None, time_p50=1e-6, time_p20=1e-6,
                      time_p80=1e-6)], problem=index)
"""


@pytest.fixture
def crashing(tmp_path):
    path = tmp_path / "crashing.py"
    path.write_text(textwrap.dedent(CRASHING))
    return (sys.executable, str(path))


def tasks_of(*problems):
    base = chosen(SMALL)
    every = [Variant(CHOSEN, base), *(Variant(f"stages={i}", changed(SMALL, base, {"stages": i})) for i in (2, 3))]
    changes = ({"stages": 2}, {"stages": 3})
    return [command.Task(problem, changes, every, [Code(registers=90, stack=0)] * 3) for problem in problems]


def test_whoever_ends_a_worker_is_a_failure_and_all_others_are_measured(crashing):
    tasks = tasks_of(SMALL, SMALL, SMALL)
    done = []
    command.supervise(tasks, crashing, 100.0, 3, False, stalls=3.0, done=done.append)
    assert done == tasks
    first, second, third = ({r["variant"]: r for r in task.results} for task in tasks)
    for found in (first, third):
        assert found[CHOSEN]["status"] == "ok"
        assert found["stages=2"]["reason"] == "CUDA error: an illegal memory access"
        assert found["stages=3"]["reason"] == "its process said nothing for 3 s and was killed"
    assert {r["status"] for r in second.values()} == {"failed"} and len(second) == 3
    assert "its process ended with status 7" in second[CHOSEN]["reason"]


def test_workers_that_measure_nothing_are_given_up(tmp_path):
    tasks = tasks_of(*[SMALL] * 5)
    command.supervise(tasks, (sys.executable, "-c", "raise SystemExit(9)"), 100.0, 3, False)
    assert all(len(task.results) == 3 for task in tasks)
    assert "status 9" in tasks[0].results[0]["reason"] and "two processes" in tasks[4].results[0]["reason"]


@pytest.fixture
def pretended(monkeypatch, crashing, tmp_path):
    """A machine whose GPU is the crashing worker and whose compiler knows one number of stages only."""
    facts = SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(command.records, "environment", lambda device: {"id": "x", "device": "a GPU"})
    monkeypatch.setattr(command, "WORKER", crashing)

    def compile_all(work, arch, jobs):
        assert arch == "sm_90a"
        few = chosen(SMALL).stages
        return [Code(registers=9, stack=0) if v.config.stages == few else Code(reason="too many") for _, v in work]

    monkeypatch.setattr(code, "compile_all", compile_all)
    return ["--output-dir", str(tmp_path), "--shapes", "512x1024"]


def test_a_run_prints_a_table_and_writes_a_record_for_every_configuration(pretended, tmp_path, capsys):
    wanted = chosen(SMALL).stages + 1
    assert main([*pretended, "--vary", f"stages={wanted}"]) == 0
    out = capsys.readouterr().out
    assert "| configuration" in out and f"skipped: stages={wanted}: too many" in out
    (path,) = tmp_path.glob("*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_name = {record["variant"]: record for record in found}
    assert by_name[f"stages={wanted}"]["config"]["stages"] == wanted
    assert by_name[CHOSEN]["registers"] == 9 and by_name[CHOSEN]["device"] == "a GPU"
    assert by_name[CHOSEN]["config"]["tokens"] == 1 and by_name[CHOSEN]["n"] == 512


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--set", "nothing"], "there is no such set"),
        (["--set", next(iter(named.SETS)), "--vary", "stages=1"], "leave one out"),
        (["--shapes", "512"], "is not a size"),
        (["-m", "0"], "positive"),
        (["--vary", "stage=1"], "names no field"),
        (["--format", "lut9"], "lut9"),
        (["--nonsense"], "see --help"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(arguments, text, capsys):
    assert main([*arguments, "--compile-only"]) == 2
    assert text in capsys.readouterr().err


def test_without_a_gpu_the_command_says_what_it_can_do(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "--compile-only" in capsys.readouterr().err


def test_the_named_sets_are_listed_with_their_seconds(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} (about {found.seconds} s)" in out for name, found in named.SETS.items())


@needs_nvrtc
def test_code_is_described_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FDK_CACHE_DIR", str(tmp_path))
    assert main(["--compile-only", "--shapes", "512x1024", "--vary", "stage_units=1,3", "stages=1"]) == 0
    out = capsys.readouterr().out
    assert "does not compile" in out and "| chosen" in out
