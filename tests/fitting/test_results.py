"""What is kept of a fit, and what is recommended."""

import dataclasses
from pathlib import Path

from ifp_mlx.fitting.candidates import Candidate, candidates
from ifp_mlx.fitting.fidelity import Fidelity
from ifp_mlx.fitting.results import FitRecord, Measured, frontier, recommend
from ifp_mlx.units.amounts import Amounts

F = 1536
FAITHFUL = Fidelity(0.1, 12.0)
AMOUNTS = Amounts(F, 64, 64, "FFN units")


def row(
    kept: int, memory: int, changed: float, bits: int | None = None, right: int | None = None
) -> Measured:
    fidelity = Fidelity(changed, 12.0)
    checked = 0 if right is None else 10
    return Measured(
        Candidate(kept, bits), memory, memory, fidelity, num_right=right, num_checked=checked
    )


def test_smallest_that_keeps_up_is_recommended() -> None:
    rows = [row(F, 100, 0.0), row(1408, 90, 0.4), row(1024, 70, 6.0), row(F, 60, 1.1, bits=8)]
    assert recommend(rows) is rows[3]
    assert recommend(rows[:3]) is rows[1]
    assert recommend(rows[:1]) is rows[0]


def test_of_two_that_take_as_much_memory_the_smaller_file_is_recommended() -> None:
    whole = row(F, 100, 0.0)  # a CPU unpacks what is packed
    packed = dataclasses.replace(row(F, 100, 0.5, bits=6), disk_bytes=40)
    assert recommend([whole, packed]) is packed


def test_with_a_budget_the_most_faithful_that_fits_is_recommended() -> None:
    rows = [row(F, 100, 0.0), row(1408, 90, 0.4), row(F, 60, 1.1, bits=8)]
    assert recommend(rows, 95) is rows[1]
    assert recommend(rows, 70) is rows[2]
    assert recommend(rows, 50) is None


def test_the_users_check_has_the_last_word() -> None:
    rows = [row(F, 100, 0.0, right=9), row(1408, 90, 0.4, right=7), row(1216, 80, 0.5, right=8)]
    assert recommend(rows) is rows[2]


def test_an_adapters_part_is_judged_by_the_check_alone() -> None:
    whole, part = row(F, 100, 0.0, right=5), row(768, 70, 24.0, right=5)
    adapted = dataclasses.replace(part, is_adapted=True)
    assert recommend([whole, part]) is whole
    assert recommend([whole, adapted]) is adapted
    unchecked = dataclasses.replace(adapted, num_right=None, num_checked=0, fidelity=FAITHFUL)
    assert recommend([row(F, 100, 0.0), unchecked]).candidate == Candidate(F)  # type: ignore[union-attr]


def test_frontier_has_what_nothing_smaller_beats() -> None:
    rows = [row(F, 100, 0.0), row(1408, 90, 0.4), row(1024, 95, 6.0), row(512, 40, 20.0)]
    assert frontier(rows) == {"1536@source", "1408@source", "512@source"}


def test_a_record_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = FitRecord(tmp_path, {"task": "x"})
    first.add(row(F, 100, 0.0))
    first.add(dataclasses.replace(row(512, 40, 20.0), is_lost=True))
    again = FitRecord(tmp_path, {"task": "x"})
    assert again.get(Candidate(512)) == first.get(Candidate(512))
    assert again.get(Candidate(1408)) is None
    assert FitRecord(tmp_path, {"task": "y"}).get(Candidate(512)) is None
    first.path.write_text("{damaged")
    assert FitRecord(tmp_path, {"task": "x"}).get(Candidate(512)) is None


def test_candidates_are_of_fewer_bits_than_the_source() -> None:
    found = list(candidates(AMOUNTS, 4, is_mixture=False))
    assert found[0] == Candidate(F)
    assert {candidate.bits for candidate in found} == {None, 3}
    assert [c for c in found if c.only_reads] == [Candidate(1024, only_reads=True)]
    experts = list(candidates(Amounts(128, 1, 8, "experts"), 16, is_mixture=True))
    assert {c.num_kept_units for c in experts} == {128, 112, 96, 80, 64}
    assert not [c for c in experts if c.only_reads]


def test_what_is_below_a_lost_candidate() -> None:
    lost = Candidate(1024)
    assert Candidate(768).is_below(lost)
    assert Candidate(1024, 4).is_below(lost)
    assert not Candidate(F, 4).is_below(lost)
    assert not Candidate(768, only_reads=True).is_below(lost)
