"""A tenth of the damage that ``python -m tests.data.checking.fuzz 10000`` does."""

from pathlib import Path

from tests.data.checking.fuzz import fuzz


def test_random_damage_loses_nothing_good_and_gives_no_wrong_label(tmp_path: Path) -> None:
    outcomes = fuzz(1000, tmp_path)
    assert outcomes.total() == 1000
    assert min(outcomes[how] for how in ("read", "reported", "refused")) > 50  # each of them is exercised
