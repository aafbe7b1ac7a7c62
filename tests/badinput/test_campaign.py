"""A sample of the campaign; `make bad-input` runs all of it and writes docs/reliability.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.badinput.campaign import campaign
from tests.badinput.outcome import Outcome, outcome, summary
from tests.badinput.reward_cases import reward_cases
from tests.badinput.weight_cases import HARM, weight_cases


def faults(found: list[Outcome]) -> list[Outcome]:
    return [one for one in found if not one.good]


def test_a_sample_is_refused_in_one_line_or_read_as_it_says(tmp_path: Path) -> None:
    found, _ = campaign(tmp_path, mutations=60, draws=40, every=9)
    assert not faults(found)
    assert {row["refused"] > 0 for row in summary(found).values()} == {True} and len(summary(found)) == 7


@pytest.mark.parametrize("name", ["a pickle that runs a command", "a shard missing", "8-bit floats", "only a variant"])
def test_models_as_downloads_leave_them(tmp_path: Path, name: str) -> None:
    case = next(case for case in weight_cases(tmp_path, [name]) if case.name == name)
    assert name in HARM and outcome(case).good
    assert not (tmp_path / "it_ran").exists()


def test_a_reward_s_files_that_are_damaged_are_seen_before_an_actor_starts(tmp_path: Path) -> None:
    cases = (case for case in reward_cases(tmp_path, ["shapes_clip"]) if "model.safetensors" in case.name)
    found = {case.name.split(": ")[1]: outcome(case) for case in cases}
    assert not faults(list(found.values()))
    assert {name for name, one in found.items() if one.verdict == "accepted"} == {"fp64"} and len(found) == 10


@pytest.mark.long
def test_the_whole_campaign(tmp_path: Path) -> None:
    found, _ = campaign(tmp_path)
    assert not faults(found) and len(found) > 1000
