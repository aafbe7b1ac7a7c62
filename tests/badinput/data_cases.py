"""Columns, splits, selections, weights and held-out shares that do not fit their files, or fit them oddly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.preflight import Checked
from tests.badinput.outcome import Case
from tests.small import small_overrides

KIND = "key of the data"
A, B, C = "a red circle", "two blue squares", "a green star"
ALL = [A, B, C]
ROWS = [
    {"caption": A, "kind": "color", "tags": ["one", "red"], "n": 1, "w": 1, "flag": True, "none": None},
    {"caption": B, "kind": "counting", "tags": ["two"], "n": 2, "w": 2.5, "flag": False, "none": None},
    {"caption": C, "kind": "color", "tags": ["one"], "n": 3, "w": "0", "flag": True, "none": None},
]
MANY = ["a blue square", "a red ring", "a green circle", "two red stars", "a blue cross", "a green ring"]

CHOSEN: dict[str, tuple[str, list[str] | None]] = {
    "columns": ("columns={prompt: caption}", ALL),
    "columns, another": ("columns={prompt: captoin}", None),
    "columns, upper case": ("columns={prompt: Caption}", None),
    "columns, a word": ("columns=caption", None),
    "columns, a list": ("columns=[caption]", None),
    "columns, a list of names": ("columns={prompt: [caption, kind]}", None),
    "columns, a number": ("columns={prompt: 1}", None),
    "columns, null": ("columns={prompt: null}", None),
    "columns, no name": ('columns={prompt: ""}', None),
    "columns, none": ("columns={}", None),
    "columns, the wrong way round": ("columns={caption: prompt}", None),
    "columns, one that is not there": ("columns={prompt: caption, skill: kid}", None),
    "columns, one for two names": ("columns={prompt: caption, skill: caption}", ALL),
    "columns, exchanged": ("columns={prompt: caption, kind: tags, tags: kind} where={kind: red}", [A]),
    "columns, a list in each line": ("columns={prompt: tags}", None),
    "columns, a number in each line": ("columns={prompt: n}", None),
    "columns, null in each line": ("columns={prompt: none}", None),
    "columns, a name with a line break": ('columns={prompt: "cap\\ntion"}', None),
    "columns, a very long name": (f"columns={{prompt: {'x' * 5000}}}", None),
    "columns, a very long name beside": (f"columns={{prompt: caption, {'y' * 900}: {'x' * 5000}}}", None),
    "split of a file": ("columns={prompt: caption} split=train", None),
    "split with a line break": ('columns={prompt: caption} split="tr\\nain"', None),
    "split, no name": ('columns={prompt: caption} split=""', None),
    "split, a list": ("columns={prompt: caption} split=[train]", None),
    "where": ("columns={prompt: caption} where={kind: [color]}", [A, C]),
    "where, a word": ("columns={prompt: caption} where={kind: counting}", [B]),
    "where, a tag": ("columns={prompt: caption} where={tags: [red, two]}", [A, B]),
    "where, two columns": ("columns={prompt: caption} where={tags: one, n: [2, 3]}", [C]),
    "where, all": ("columns={prompt: caption} where={}", ALL),
    "where, by another name": ("columns={prompt: caption, skill: kind} where={skill: color}", [A, C]),
    "where, no value": ("columns={prompt: caption} where={kind: []}", None),
    "where, null": ("columns={prompt: caption} where={kind: null}", None),
    "where, a mapping": ("columns={prompt: caption} where={kind: {is: color}}", None),
    "where, a condition": ("columns={prompt: caption} where=kind=color", None),
    "where, a list": ("columns={prompt: caption} where=[kind]", None),
    "where, yes or no": ("columns={prompt: caption} where={flag: true}", None),
    "where, another value": ("columns={prompt: caption} where={kind: colour}", None),
    "where, upper case": ("columns={prompt: caption} where={kind: Color}", None),
    "where, a date": ("columns={prompt: caption} where={kind: 2025-01-01}", None),
    "where, another column": ("columns={prompt: caption} where={sort: color}", None),
    "where, a column with a line break": ('columns={prompt: caption} where={"so\\nrt": color}', None),
    "where, a very long value": (f"columns={{prompt: caption}} where={{kind: {'x' * 5000}}}", None),
    "where, two that exclude each other": ("columns={prompt: caption} where={kind: color, n: 2}", None),
    "where, the prompts' column": (f"columns={{prompt: caption}} where={{caption: {A}}}", None),
    "where, nulls": ("columns={prompt: caption} where={none: null}", None),
    "where, a column of nulls": ("columns={prompt: caption} where={none: a}", None),
}
"""Overrides of a section, for a file of `ROWS` -> the prompts that are read, or None where they must be refused."""

WEIGHTS: dict[str, tuple[str, list[object]]] = {
    "numbers": ("accept", [1, 2.5, 0]),
    "numbers as texts": ("accept", ["1", " 2.5e0 ", "0"]),
    "very small numbers": ("accept", [5e-324, 5e-324, 5e-324]),
    "very different numbers": ("accept", [1e-300, 1e300, 1]),
    "negative": ("refuse", [1, -1, 1]),
    "all 0": ("refuse", [0, 0.0, "0"]),
    "words": ("refuse", [1, "much", 1]),
    "yes and no": ("refuse", [True, False, True]),
    "nulls": ("refuse", [1, None, 1]),
    "lists": ("refuse", [1, [2], 1]),
    "blank": ("refuse", [1, "", 1]),
    "percent": ("refuse", ["10%", "20%", "70%"]),
    "a comma": ("refuse", ["0,5", "1", "1"]),
    "not a number": ("refuse", [1, float("nan"), 1]),
    "infinite": ("refuse", [1, "inf", 1]),
    "a number that no float holds": ("refuse", [1, 10**400, 1]),
    "numbers whose sum no float holds": ("refuse", [1e308, 1e308, 1e308]),
    "missing": ("refuse", [1, ..., 1]),
}
"""What the weights of three prompts are -> whether they can be drawn by them."""

HELD: dict[str, str] = {
    "a fraction alone": "data.heldout=0.5",
    "percent": "data.heldout={fraction: 50%}",
    "no fraction": "data.heldout={seed: 1}",
    "nothing": "data.heldout={fraction: 0}",
    "all": "data.heldout={fraction: 1}",
    "more than all": "data.heldout={fraction: 5}",
    "negative": "data.heldout={fraction: -0.1}",
    "not a number": "data.heldout={fraction: .nan}",
    "a misspelt key": "data.heldout={fracton: 0.5}",
    "a negative seed": "data.heldout={fraction: 0.5, seed: -1}",
    "half a seed": "data.heldout={fraction: 0.5, seed: 0.5}",
    "almost nothing": "data.heldout={fraction: 1.0e-18}",
    "almost all": "data.heldout={fraction: 0.9999999999999999}",
    "a file's columns": "data.heldout={fraction: 0.5} evaluation.columns={prompt: caption}",
    "a file's split": "data.heldout={fraction: 0.5} evaluation.split=test",
    "a selection of none": "data.heldout={fraction: 0.5} evaluation.where={kind: nothing}",
    "a selection by another column": "data.heldout={fraction: 0.5} evaluation.where={sort: a}",
    "a limit of none": "data.heldout={fraction: 0.5} evaluation.limit=0",
    "no share is held out": "",
    "misspelt": "data.heldout={fraction: 0.5} evaluation.prompts=data:held_out",
    "to train on": "data.heldout={fraction: 0.5} data.prompts=data:heldout",
    "weights of their own": "data.heldout={fraction: 0.5} evaluation.weights=w",
}
"""What is wrong with `data.heldout` and an evaluation of it."""


def data_cases(folder: Path) -> Iterator[Case]:
    """Each choice in `data` and, of a file of its own, in `evaluation`; then weights and held-out shares."""
    file, plain = folder / "rows.jsonl", folder / "plain.txt"
    _write(file, ROWS)
    plain.write_text(f"{A}\n{B}\n")
    for name, (choice, expected) in CHOSEN.items():
        for section in ("data", "evaluation"):
            source = _sources(plain, file) if section == "evaluation" else [f"data.prompts={file}"]
            yield _case(f"{section}.{name}", [*source, *_within(section, choice)], section, expected)
    for section in ("data", "evaluation"):
        source = [f"data.prompts={plain}", f"evaluation.prompts={plain}"]
        for choice in ("columns={prompt: caption}", "where={kind: color}"):
            yield _case(f"{section}.{choice[:5]} of plain text", [*source, f"{section}.{choice}"], section, None)
    yield from _weighted(folder)
    yield from _held_out(folder)


def _weighted(folder: Path) -> Iterator[Case]:
    for number, (name, (may, weights)) in enumerate(WEIGHTS.items()):
        file = folder / f"w{number}.jsonl"
        rows = [{"prompt": text, "w": weight} for text, weight in zip(ALL, weights, strict=True)]
        _write(file, [{key: value for key, value in row.items() if value is not ...} for row in rows])
        overrides = [f"data.prompts={file}", "data.weights=w"]

        def right(_: RunConfig, checked: Checked, weights: list[object] = weights) -> bool:
            return [record.weight for record in checked.training] == [float(str(weight)) for weight in weights]

        yield Case(KIND, f"weights, {name}", *_run(overrides), ["data.weights"], right, may)
    file = folder / "rows.jsonl"
    columns = "data.columns={prompt: caption, importance: w}"
    for name, key in {"another": "weight", "the prompts'": "caption", "words": "kind", "tags": "tags"}.items():
        overrides = [f"data.prompts={file}", columns, f"data.weights={key}"]
        yield _case(f"weights, {name} column", overrides, "data", None)
    for name, value in {"a number": "1", "a list": "[w]", "no name": '""', "a line break": '"w\\n"'}.items():
        yield _case(f"weights, {name}", [f"data.prompts={file}", columns, f"data.weights={value}"], "data", None)
    overrides = [f"data.prompts={file}", columns, "data.weights=importance"]
    yield _case("weights, by another name", overrides, "data", ALL)
    yield _case("weights, 0 where chosen", [*overrides, "data.where={n: 3}"], "data", None)


def _held_out(folder: Path) -> Iterator[Case]:
    file = folder / "many.jsonl"
    _write(file, [{"prompt": text, "kind": "color"} for text in (*ALL, *MANY)])
    source = [f"data.prompts={file}", "evaluation.prompts=data:heldout"]
    for name, choice in HELD.items():
        overrides = [*source, *choice.replace(" data.", "|data.").replace(" evaluation.", "|evaluation.").split("|")]
        names = ["heldout", "evaluation", "data.prompts"]
        yield Case(KIND, f"held out, {name}", *_run([o for o in overrides if o]), names, None, "refuse")
    for seed in (0, 10**30):
        overrides = [*source, f"data.heldout={{fraction: 0.5, seed: {seed}}}", "evaluation.where={kind: color}"]

        def right(_: RunConfig, checked: Checked, seed: int = seed) -> bool:
            sides: tuple[list[str], list[str]] = ([], [])
            for text in (*ALL, *MANY):
                sides[_of_a_hash(text, seed) < 0.5].append(text)
            return ([r.text for r in checked.training], [r.text for r in checked.held_out]) == sides

        yield Case(KIND, f"held out, seed {seed}", *_run(overrides), [], right, "accept")
    weighted = folder / "weighted.jsonl"
    _write(weighted, [{"prompt": text, "w": int(_of_a_hash(text, 0) < 0.5)} for text in (*ALL, *MANY)])
    overrides = [f"data.prompts={weighted}", "data.weights=w", "data.heldout={fraction: 0.5}"]
    yield Case(KIND, "held out, all that have weights", *_run(overrides), ["data.weights"], None, "refuse")
    copies = folder / "copies.txt"
    copies.write_text(f"{A}\n {A.upper()}\n".lower() * 50)
    overrides = [f"data.prompts={copies}", "data.heldout={fraction: 0.5}"]
    yield Case(KIND, "held out, copies of one prompt", *_run(overrides), ["data.heldout"], None, "refuse")


def _of_a_hash(text: str, seed: int) -> float:
    """Where a prompt stands between 0 and 1, as docs/prompts.md has it: by the seed and its text alone."""
    digest = hashlib.sha256(f"{seed} {text}".encode()).hexdigest()
    return int(digest[:16], 16) / 2**64


def _write(file: Path, rows: Sequence[object]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _sources(training: Path, evaluation: Path) -> list[str]:
    return [f"data.prompts={training}", f"evaluation.prompts={evaluation}"]


def _within(section: str, choice: str) -> list[str]:
    """`columns={…} where={…}` as overrides of a section."""
    parts = choice.replace(" where=", "|where=").replace(" split=", "|split=").split("|")
    return [f"{section}.{part}" for part in parts]


def _run(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """The configuration and its overrides. Nothing is encoded, so the cache needs no folder."""
    return "shapes_flowbp_sparse", [*small_overrides(Path.cwd()), "encoder.cache=null", *overrides]


def _case(name: str, overrides: Sequence[str], section: str, expected: list[str] | None) -> Case:
    names = [f"{section}.", "jsonl", "plain.txt"]
    if expected is None:
        return Case(KIND, name, *_run(overrides), names, None, "refuse")

    def right(_: RunConfig, checked: Checked) -> bool:
        found = checked.training if section == "data" else checked.held_out
        return [record.text for record in found] == expected

    return Case(KIND, name, *_run(overrides), names, right, "accept")
