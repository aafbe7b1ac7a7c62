"""Prompt files, and which prompts a step draws."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from flowbp_ray import prompts
from tests.badinput.outcome import ADVICE
from tests.badinput.prompt_cases import BY_FAMILY, TEXTS
from tests.small import small_config


def test_prompt_files_of_all_kinds_read_the_same(tmp_path: Path) -> None:
    texts = ["a cat", "a dog on a boat"]
    (tmp_path / "p.txt").write_text("\n".join(texts) + "\n\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": t, "skill": "x"}) + "\n" for t in texts))
    parquet.write_table(pa.table({"prompt": texts}), tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text('"prompt"\n' + "".join(f'"{text}"\n' for text in texts))
    for suffix in ("txt", "jsonl", "csv", "parquet"):
        assert [r.text for r in prompts.load(str(tmp_path / f"p.{suffix}"))] == texts
    assert prompts.load(str(tmp_path / "p.jsonl"))[0].extra == {"skill": "x"}
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="entry 1: no text under 'prompt'"):
        prompts.load(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("case", sorted(TEXTS))
def test_prompt_files_as_people_have_them(tmp_path: Path, case: str) -> None:
    """Refused in one short line that names the file, or read as meant. What only a family refuses is read here."""
    suffix, raw, expected = TEXTS[case]
    file = tmp_path / f"p.{suffix}"
    file.write_bytes(raw)
    if expected is None and case in BY_FAMILY:
        assert prompts.load(str(file))
    elif expected is None:
        with pytest.raises(ValueError, match=rf"p\.{suffix}") as caught:
            prompts.load(str(file))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and ADVICE.search(str(caught.value))
    else:
        assert [record.text for record in prompts.load(str(file))] == expected


def test_an_epoch_holds_every_prompt_once_and_position_is_the_step() -> None:
    seen = [i for step in range(10) for i in prompts.ids_of_step(25, 5, step, seed=1)]
    assert sorted(seen[:25]) == sorted(seen[25:]) == list(range(25))
    assert seen[:25] != seen[25:]
    assert prompts.ids_of_step(25, 5, 7, seed=1) == seen[35:40]
    larger = prompts.ids_of_step(3, 7, 0, seed=3)  # more prompts a step than the file holds
    assert sorted(larger[:3]) == sorted(larger[3:6]) == [0, 1, 2] and len(larger) == 7


@pytest.mark.parametrize("count", [5, 40, 107_515])
@pytest.mark.parametrize("first", [0, 3, 6, 8])
def test_what_a_run_draws_is_known_in_advance_in_the_order_of_need(tmp_path: Path, count: int, first: int) -> None:
    """Against the ids of each step: 8 steps of 4 prompts, evaluated before step 0 and after steps 5 and 8."""
    config = small_config(tmp_path, "refl", "steps=8", "evaluation.prompts=shapes:dev", "evaluation.every=5")
    found = prompts.drawn(config, count, 6, first)
    steps = {step: prompts.ids_of_step(count, 4, step, config.seed) for step in range(first, 8)}
    held_out = list(range(count, count + 6))
    due = {0: 0, 3: 5, 6: 8, 8: 8}[first]
    before = [i for step in steps if step < due for i in steps[step]]
    after = [i for step in steps if step >= due for i in steps[step]]
    assert found == list(dict.fromkeys([*before, *(held_out if first < 8 else []), *after]))
    assert len(found) == len(set(found)) <= 4 * 8 + 6


def test_a_run_of_many_epochs_draws_each_prompt_once_and_lists_them_at_once(tmp_path: Path) -> None:
    endless = small_config(tmp_path, "refl", "steps=1000000000")
    for first in (0, 7):
        assert sorted(prompts.drawn(endless, 25, 0, first)) == list(range(25))


@pytest.mark.parametrize("count", [3, 5, 40])
@pytest.mark.parametrize("held_out", [0, 6])
def test_what_a_window_of_steps_needs_and_when_a_prompt_is_needed_last(
    tmp_path: Path, count: int, held_out: int
) -> None:
    """Against each step's own ids: 8 steps of 4 prompts, evaluated before step 0 and after steps 5 and 8."""
    config = small_config(tmp_path, "refl", "steps=8", "evaluation.every=5")
    needs = prompts.Needs(config, count, held_out)
    steps = [prompts.ids_of_step(count, 4, step, config.seed) for step in range(8)]
    for first in range(9):
        for last in range(first, 11):
            drawn = {i for ids in steps[first:last] for i in ids}
            evaluated = first < min(last, 8) and any(first < at <= last or first == at == 0 for at in (0, 5, 8))
            found = needs.between(first, last)
            assert set(found) == drawn | (set(range(count, count + held_out)) if evaluated else set())
            assert len(found) == len(set(found))
    assert needs.between(3) == prompts.drawn(config, count, held_out, 3)
    for prompt, last in needs.last_steps().items():
        assert last == max((s for s, ids in enumerate(steps) if prompt in ids), default=7)
    assert set(needs.last_steps()) >= {i for ids in steps for i in ids} | set(range(count, count + held_out))


def test_partiprompts_is_read_as_it_is(tmp_path: Path) -> None:
    """Its quotes are not a spreadsheet's, its columns begin with capitals, and it is divided by category."""
    lines = [
        "Prompt\tCategory\tChallenge\tNote",
        'a robot. The words "Fly an airplane" are on the wall.\tOutdoor Scenes\tComplex\t',
        "42\tAbstract\tBasic\tSimple numbers but challenging",
    ]
    file = tmp_path / "PartiPrompts.tsv"
    file.write_text("\n".join(lines) + "\n")
    found = prompts.load(str(file))
    assert [r.text for r in found] == ['a robot. The words "Fly an airplane" are on the wall.', "42"]
    assert [r.skill for r in found] == ["Outdoor Scenes", "Abstract"]
    file.write_text("Prompt\tCategory\na\tb\tc\n")
    with pytest.raises(ValueError, match="line 2: more fields than columns"):
        prompts.load(str(file))
    file.write_text("Caption\na\n")
    with pytest.raises(ValueError, match="line 1: no column is called prompt"):
        prompts.load(str(file))
