"""Which records of many runs belong together."""

from fdk.bench import records, runs


def entry(id, format, m, day):
    """A record of a run; runs are told apart by their id and ordered by their date."""
    return records.record(
        test="mv", provider="fdk", format=format, dtype="bf16", m=m, n=64, k=64, id=id, date=f"2026-11-{day}"
    )


OLD = [entry("old", "lut4_g64", m, 1) for m in (1, 8)]
MIDDLE = [entry("middle", name, m, 2) for name in ("lut4_g64", "lut2_g64") for m in (1, 8)]
NEW = [entry("new", "lut4_g64", m, 3) for m in (1, 8, 64)]


def test_the_newest_record_of_a_line():
    assert runs.newest([NEW[0], OLD[0]]) == [NEW[0]]


def test_runs_are_whole_and_come_newest_first():
    assert runs.by_run([*OLD, *NEW, *MIDDLE]) == [NEW, MIDDLE, OLD]


def test_a_run_that_adds_a_line_is_kept_whole_and_one_that_adds_none_is_not():
    assert runs.needed_runs([*OLD, *MIDDLE, *NEW]) == [*NEW, *MIDDLE]


def test_older_runs_show_rows_beyond_those_of_newer_ones():
    wide = [entry("wide", "lut4_g64", m, 1) for m in (1, 8, 32, 64, 4096)]
    late = [entry("late", "lut4_g64", m, 3) for m in (8, 64)]
    found = runs.pieces([*wide, *late, *MIDDLE], lambda e: e["format"])
    assert [[(e["id"], e["m"]) for e in piece] for piece in found] == [
        [("late", 8), ("late", 64)],
        [("middle", 1)],
        [("middle", 1), ("middle", 8)],
        [("wide", 4096)],
    ]


def test_the_fullest_run():
    assert runs.fullest_run([*OLD, *MIDDLE, *NEW]) == MIDDLE
    assert runs.fullest_run([*OLD, *MIDDLE[:2]]) == MIDDLE[:2]
    assert runs.fullest_run([]) == []
