"""Prompt files, and which prompts a step draws."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from flowbp_ray import prompts
from flowbp_ray.config.data import HeldOutConfig
from flowbp_ray.local import LocalLoop
from flowbp_ray.preflight import check, describe_prompts
from flowbp_ray.prompts import is_held_out
from flowbp_ray.run.folder import Run, prompts_digest
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


WEIGHTS = (1.0, 0.0, 3.0, 0.5, 0.5, 0.0, 7.0)


@pytest.mark.parametrize(("count", "per_step", "seed"), [(25, 5, 1), (3, 7, 3), (40, 8, 9)])
def test_equal_weights_draw_as_no_weights_do(count: int, per_step: int, seed: int) -> None:
    for step in range(30):
        found = prompts.ids_of_step(count, per_step, step, seed, (0.3,) * count)
        assert found == prompts.ids_of_step(count, per_step, step, seed)
    assert prompts.weights_of([prompts.PromptRecord("a", weight=0.3)] * 4) == ()


def test_weights_say_how_often_a_prompt_is_drawn() -> None:
    """In an epoch of n places its share n·w/Σw, rounded down or up; over many epochs the share itself."""
    count, epochs = len(WEIGHTS), 2000
    ids = np.array([prompts.ids_of_step(count, count, epoch, 5, WEIGHTS) for epoch in range(epochs)])
    drawn = np.stack([(ids == i).sum(1) for i in range(count)], axis=1)
    share = count * np.array(WEIGHTS) / sum(WEIGHTS)
    assert (np.floor(share) <= drawn).all() and (drawn <= np.ceil(share)).all()
    assert np.abs(drawn.mean(0) - share).max() < 4 * 0.5 / epochs**0.5  # four standard errors of a rounding
    assert len({tuple(epoch) for epoch in ids[:10]}) == 10  # and they are shuffled


def test_a_step_of_weighted_prompts_spans_epochs_and_is_its_position() -> None:
    count, whole = len(WEIGHTS), [i for step in range(20) for i in prompts.ids_of_step(7, 7, step, 1, WEIGHTS)]
    for per_step in (3, 5, 11):
        steps = [prompts.ids_of_step(count, per_step, step, 1, WEIGHTS) for step in range(140 // per_step)]
        assert [i for ids in steps for i in ids] == whole[: 140 // per_step * per_step]


@pytest.mark.parametrize("steps", [3, 8, 60])
def test_what_a_weighted_run_needs_is_known_in_advance(tmp_path: Path, steps: int) -> None:
    """Against each step's own ids. Beyond two epochs what may come is listed too; what has weight 0 never is."""
    config = small_config(tmp_path, "refl", f"steps={steps}")
    needs = prompts.Needs(config, len(WEIGHTS), 0, 0, WEIGHTS)
    each = [prompts.ids_of_step(len(WEIGHTS), 4, step, config.seed, WEIGHTS) for step in range(steps)]
    never = {i for i, weight in enumerate(WEIGHTS) if not weight}
    for first in range(0, steps, 3):
        for last in range(first, steps + 1, 2):
            found, used = needs.between(first, last), {i for ids in each[first:last] for i in ids}
            assert used <= set(found) and not never & set(found) and len(found) == len(set(found))
            assert set(found) == used or (last - first) * 4 > 2 * len(WEIGHTS)
    for prompt, last in needs.last_steps().items():
        own = [step for step, ids in enumerate(each) if prompt in ids]
        assert prompt not in never and last >= max(own, default=0)
        assert own == [] or last == max(own) or (steps - max(own)) * 4 > 2 * len(WEIGHTS)


def test_a_share_is_held_out_by_the_text_alone(tmp_path: Path) -> None:
    """Adding prompts moves none, duplicates and other spellings of case and blanks are on one side."""
    file, lines = tmp_path / "p.txt", [f"a cat with {i} stripes" for i in range(400)]
    file.write_text("\n".join(lines) + "\n")
    over = [f"data.prompts={file}", "data.heldout={fraction: 0.25, seed: 3}", "evaluation.prompts=data:heldout"]
    config = small_config(tmp_path, "refl", *over)
    training, kept = ([r.text for r in records] for records in prompts.read_prompts(config))
    assert sorted([*training, *kept]) == sorted(lines) and 70 <= len(kept) <= 130  # ±3 standard deviations
    assert [r.text for r in prompts.training_prompts(config)] == training
    assert [r.text for r in prompts.evaluation_prompts(config)] == kept
    file.write_text("\n".join(["a new dog", *lines[::-1], kept[0].upper(), f"  {training[0]}  ", training[0]]) + "\n")
    more, now = ([r.text for r in records] for records in prompts.read_prompts(config))
    assert set(kept) <= set(now) and set(training) <= set(more) and kept[0].upper() in now
    assert more.count(training[0]) == 3 and not set(map(str.lower, now)) & set(more)
    other = prompts.evaluation_prompts(small_config(tmp_path, "refl", *over, "data.heldout.seed=4"))
    assert {r.text for r in other} != set(now)
    larger = prompts.evaluation_prompts(small_config(tmp_path, "refl", *over, "data.heldout.fraction=0.4"))
    assert set(now) <= {r.text for r in larger}  # a larger share only adds
    limited = prompts.evaluation_prompts(small_config(tmp_path, "refl", *over, "evaluation.limit=5"))
    assert [r.text for r in limited] == now[:5]


def test_a_share_that_leaves_nothing_on_a_side_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a cat\n")
    for fraction, words in ((0.001, "holds out none .* write a larger"), (0.999, "leaves none .* write a smaller")):
        config = small_config(tmp_path, "refl", f"data.prompts={file}", f"data.heldout={{fraction: {fraction}}}")
        with pytest.raises(ValueError, match=rf"data\.heldout\.fraction={fraction} {words}"):
            prompts.read_prompts(config)
    weighted = tmp_path / "p.csv"
    weighted.write_text("prompt,w\n" + "".join(f"a {i},{float(i == 3)}\n" for i in range(30)))
    held_out = set()
    for seed in range(9):  # in some the one prompt with a weight is held out
        over = [f"data.prompts={weighted}", "data.weights=w", f"data.heldout={{fraction: 0.5, seed: {seed}}}"]
        held = is_held_out("a 3", HeldOutConfig(fraction=0.5, seed=seed))
        with pytest.raises(ValueError, match=r"data\.weights: 'w' is 0 for all .*; write") if held else nullcontext():
            prompts.read_prompts(small_config(tmp_path, "refl", *over))
        held_out.add(held)
    assert held_out == {True, False}
    with pytest.raises(ValueError, match=r"evaluation\.prompts=data:heldout needs data\.heldout; write"):
        small_config(tmp_path, "refl", "evaluation.prompts=data:heldout")
    with pytest.raises(ValueError, match=r"evaluation\.columns is for a file of its own.*; write"):
        small_config(tmp_path, "refl", "evaluation.prompts=data:heldout", "data.heldout={fraction: 0.1}",
                     "evaluation.columns={prompt: x}")  # fmt: skip


def test_evaluation_reads_its_own_columns_and_selects_of_what_is_held_out(tmp_path: Path) -> None:
    train, test = tmp_path / "train.csv", tmp_path / "test.jsonl"
    train.write_text("caption,kind\n" + "".join(f"prompt {i},{'even' if i % 2 == 0 else 'odd'}\n" for i in range(60)))
    test.write_text('{"text": "a cat", "level": 3}\n{"text": "a dog", "level": 4}\n')
    over = [f"data.prompts={train}", "data.columns={prompt: caption}", "data.heldout={fraction: 0.3}"]
    own = small_config(tmp_path, "refl", *over, f"evaluation.prompts={test}", "evaluation.columns={prompt: text}",
                       "evaluation.where={level: 4}")  # fmt: skip
    assert [r.text for r in prompts.evaluation_prompts(own)] == ["a dog"]
    even = [*over, "evaluation.prompts=data:heldout", "evaluation.where={kind: even}"]
    found = prompts.evaluation_prompts(small_config(tmp_path, "refl", *even))
    assert found and all(int(r.text.split()[1]) % 2 == 0 for r in found)
    with pytest.raises(
        ValueError, match=r"evaluation\.where takes no prompt by kind=\['prime'\]; it holds '(odd|even)' \("
    ):
        prompts.evaluation_prompts(small_config(tmp_path, "refl", *even[:-1], "evaluation.where={kind: prime}"))


def test_a_run_is_bound_to_the_weights_of_its_prompts(tmp_path: Path) -> None:
    run = Run.create(small_config(tmp_path, "refl", "name=bound"))
    run.bind_prompts(["a", "b"], (1.0, 2.0))
    run.check_prompts(["a", "b"], (1.0, 2.0))
    for texts, weights in ((["a", "b"], (1.0, 3.0)), (["a", "b"], ()), (["a", "c"], (1.0, 2.0))):
        with pytest.raises(ValueError, match="have changed since it began"):
            run.check_prompts(texts, weights)
    assert prompts_digest(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()  # as before there were weights


def test_prompts_are_summarised_in_a_line(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt,w\na red circle,1\na red circle,1\ntwo blue squares,4\na green star,1\n")
    config = small_config(tmp_path, "refl", f"data.prompts={file}", "data.weights=w", "evaluation.prompts=shapes:dev")
    train, held_out = prompts.read_prompts(config)
    assert describe_prompts(config, train, [*held_out, train[0]], 5, cut=False) == (
        f"prompts: 4 of {file}, 1 of them again, 16 characters at most, drawn by w from 1 to 4; 361 to evaluate on, "
        "1 of which are trained on too; the run draws 5, and none is cut off"
    )
    assert describe_prompts(config, train[2:3], [], 1, cut=True) == (
        f"prompts: 1 of {file}, 16 characters at most; the run draws 1"
    )
    assert check(small_config(tmp_path, "refl")).about[0].startswith("prompts: 24 of ")


def test_one_process_trains_on_what_is_drawn_by_weight(tmp_path: Path) -> None:
    """A weight of 0 is as if the prompt were not there; the held-out share is never drawn."""
    file = tmp_path / "p.jsonl"
    words = ["a red circle", "two blue squares", "a green star"]
    file.write_text("".join(json.dumps({"prompt": w, "w": float(i != 1)}) + "\n" for i, w in enumerate(words)))
    loop = LocalLoop(small_config(tmp_path, "refl", f"data.prompts={file}", "data.weights=w", "steps=3"))
    ids = {prompt for step in range(3) for item in loop.items(step) for prompt in item.prompt_ids}
    assert {loop.texts[i] for i in ids} == {"a red circle", "a green star"}
