"""Prompts from files of text, tables and JSON, read alike; what cannot be read is named by entry.

All kinds are UTF-8, blanks around a prompt are cut off, and an entry with nothing else is left out. Several files are
read one after the other: see `prompt_sources.folders` for how a pattern, a folder or a saved dataset names them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowbp_ray.prompt_sources import folders, hub
from flowbp_ray.prompt_sources.readers import KINDS, READERS
from flowbp_ray.prompt_sources.text import kind_of
from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.text_files import check_unicode, plain, shown

LONGEST = 100_000  # characters of a prompt; no text encoder reads a hundredth of it
SHOWN = 8  # values of a column in a message
LONGEST_PATH = 300  # characters of a path in a message
MISSING = object()
ALIKE = ("prompt", "prompts", "text", "caption", "captions", "query", "instruction")


@dataclass(frozen=True)
class PromptRecord:
    """One prompt. extra: the other fields of its line, such as a skill or a claim for the verifier.

    weight: how often it is drawn, beside the other prompts' weights.
    """

    text: str
    extra: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)
    weight: float = field(default=1.0, hash=False, compare=False)

    @property
    def skill(self) -> str:
        """The prompt's `skill`, `tag` (GenEval) or `category` (PartiPrompts), or "": what evaluations are split by."""
        named = (self.extra.get(key) for key in ("skill", "tag", "category"))
        return str(next((value for value in named if value is not None), ""))


@dataclass(frozen=True)
class Reading:
    """How prompts are read from their files. section: of the configuration that says so, for messages.

    columns: name here -> name of the file's column, where they differ. split: of a folder that has several. where:
    column -> the values that are taken, as texts. weight: column with a prompt's weight.
    """

    section: str = "data"
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None
    where: Mapping[str, list[str]] = field(default_factory=dict)
    weight: str | None = None

    @property
    def prompt(self) -> str:
        """The column of the prompts."""
        return self.columns.get("prompt", "prompt")


def load(source: str, key: str = "", reading: Reading | None = None) -> list[PromptRecord]:
    """Read prompts from a .txt (one a line), .jsonl, .json, .csv, .tsv, .parquet or .arrow file (`prompt`), several of
    them by a pattern, a folder or a dataset of the Hub, or "shapes:<split>".

    key: of the configuration that names the file, for messages. Raises ValueError, with the file's name and the line
    or entry, where a prompt is missing or cannot be read; with the key, where a column or a split is not there.
    """
    how, named = reading or Reading(), f"{key}: " if key else ""
    what, records = f"{named}prompts file {plain(source, LONGEST_PATH)}", list[PromptRecord]()
    for path, its in _files(source, named, how):
        kind = kind_of(path)
        if kind.startswith(".txt") and how.columns:
            raise ValueError(f"{its} has no columns; write {how.section}.columns=null")
        lower = kind.startswith(".tsv")  # whose columns are read in lower case
        names = {ours: theirs.lower() if lower else theirs for ours, theirs in how.columns.items()}
        column = names.get("prompt", "prompt")
        for where, row in READERS[kind](path, its, column):
            if record := _record(row, f"{its}, {where}", column, names, how):
                records.append(record)
    if not records:
        raise ValueError(f"{what} holds no prompt; write at least one")
    return select(records, what, how)


def _files(source: str, named: str, how: Reading) -> Iterator[tuple[Path, str]]:
    """The files of a source, each with what to call it. named: the source's key, for messages."""
    key, called = f"{how.section}.split", plain(source, LONGEST_PATH)
    what, several = f"{named}prompts file {called}", f"{named}prompts {called}"
    path = hub.fetched(source, READERS, several) if source.startswith(hub.PREFIX) else _resolve(source)
    if path.is_dir():
        for file in folders.within(path, tuple(READERS), several, how.split, key):
            yield file, f"{several}: {plain(str(file.relative_to(path)), LONGEST_PATH)}"
        return
    if folders.is_pattern(str(path)):
        for file in folders.matching(str(path), tuple(READERS), several, how.split, key):
            yield file, f"{several}: {plain(file.name, LONGEST_PATH)}"
        return
    if (kind := kind_of(path)) not in READERS:
        there = "does not exist" if not (kind or path.exists()) else f"ends in {kind!r}"
        raise ValueError(f"{what} {there}; write a {KINDS} file")
    if not path.is_file():
        raise ValueError(f"{what} does not exist; write the path of a {KINDS} file")
    if how.split is not None:
        raise ValueError(f"{key}={plain(how.split)}: {what} has no splits; write {key}=null")
    yield path, what


def _record(row: dict[str, Any], what: str, column: str, names: Mapping[str, str], how: Reading) -> PromptRecord | None:
    """An entry as a record; None where its prompt is blank. names: name here -> the file's column."""
    if not isinstance(row.get(column), str):
        if column in row:
            raise ValueError(
                f"{what}: {shown(column)} must be a text, got {shown(row[column])}; write one, or leave the entry out"
            )
        raise ValueError(
            f"{what}: no text under {shown(column)}, only {shown(sorted(map(str, row)))}; {_advice(row, how)}"
        )
    check_unicode(row, what)
    text = row[column].strip()
    if len(text) > LONGEST:
        raise ValueError(
            f"{what}: a prompt of {len(text)} characters ({shown(text[:40])}); at most {LONGEST} are read, write each "
            "prompt as an entry of its own"
        )
    extra = {name: value for name, value in row.items() if name != column}
    extra |= {ours: row[theirs] for ours, theirs in names.items() if ours != "prompt" and theirs in row}
    return PromptRecord(text, extra, _weight(extra, what, how)) if text else None


def _advice(columns: Any, how: Reading) -> str:
    """What to write where no column has the prompts' name: the name of one that looks like it."""
    similar = next((str(name) for name in columns if str(name).strip().lower() in ALIKE), None)
    if similar is None:
        return f"write the text under {shown(how.prompt)}, or {how.section}.columns={{prompt: NAME}}"
    return f"write {how.section}.columns={{prompt: {plain(similar)}}}, or rename {similar!r} to 'prompt'"


def _weight(extra: Mapping[str, Any], what: str, how: Reading) -> float:
    """The weight of an entry: 1, or the number in the column `how.weight`."""
    if how.weight is None:
        return 1.0
    value = _field(extra, how.weight)
    if value is MISSING:  # a column that no entry has is named once all are read
        return math.nan
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(
            f"{what}: {how.section}.weights: {shown(how.weight)} holds {shown(value)}; write a number from 0, or "
            f"{how.section}.weights=null"
        )
    return weight


def select(records: list[PromptRecord], what: str, how: Reading) -> list[PromptRecord]:
    """The records that `how.where` takes, after a look whether all columns that are asked for are there.

    what: names the source, for messages. Raises ValueError for a column that no record has, a weight that is missing,
    and where nothing is taken.
    """
    there = {name for record in records for name in record.extra}
    wanted = {f"columns.{ours}": theirs for ours, theirs in how.columns.items() if theirs != how.prompt}
    wanted |= {"weights": how.weight} if how.weight else {}
    wanted |= {f"where.{name}": name for name in how.where}
    for key, name in wanted.items():
        if name == how.prompt:
            raise ValueError(
                f"{what}: the column of the prompts, {shown(name)} ({plain(f'{how.section}.{key}')}), is for their "
                "text alone; write another column"
            )
        if _field(dict.fromkeys(there), name) is MISSING:
            raise ValueError(
                f"{what} has no column {shown(name)} ({plain(f'{how.section}.{key}')}), only "
                f"{shown(sorted(there - set(how.columns) | {how.prompt}))}; write another of these"
            )
    if bare := sum(math.isnan(record.weight) for record in records):
        raise ValueError(
            f"{what}: {bare} of {len(records)} entries have nothing under {shown(how.weight)} ({how.section}.weights); "
            "write a number from 0 there"
        )
    for name, values in how.where.items():
        found = Counter(value for record in records for value in _values(record, name))
        records = [record for record in records if set(_values(record, name)) & set(values)]
        if not records:
            has = ", ".join(f"{shown(value)} ({count})" for value, count in found.most_common(SHOWN))
            holds = f"it holds {has}{', …' * (len(found) > SHOWN)}: write one of these"
            raise ValueError(
                f"{what}: {how.section}.where takes no prompt by {plain(name)}={shown(values)}; "
                f"{holds if found else 'it holds nothing: write another column'}"
            )
    if how.weight is not None:
        _check_sum(records, what, how)
    return records


def _check_sum(records: list[PromptRecord], what: str, how: Reading) -> None:
    """Raises ValueError where nothing could be drawn in proportion: all weights are 0, or no float holds their sum."""
    total, named = sum(record.weight for record in records), f"{shown(how.weight)} ({how.section}.weights)"
    if total == 0:
        raise ValueError(f"{what}: all weights under {named} are 0; write one above 0")
    if math.isinf(total):
        raise ValueError(f"{what}: the weights under {named} are too large to be added; write smaller ones")


def _values(record: PromptRecord, column: str) -> list[str]:
    """What a record has in a column, as texts: several where it is a list, such as tags."""
    value = _field(record.extra, column)
    return [str(v) for v in value] if isinstance(value, list) else [] if value in (None, MISSING) else [str(value)]


def _field(extra: Mapping[str, Any], column: str) -> Any:
    """An entry's value in a column, or MISSING. The columns of .tsv are read in lower case."""
    return extra.get(column, extra.get(column.lower(), MISSING))


def _resolve(source: str) -> Path:
    if source.startswith("shapes:"):
        from flowbp_ray.shapes import prompt_file

        try:
            return Path(prompt_file(source.removeprefix("shapes:")))
        except ValueError as error:
            raise ValueError(f"prompts {shown(source)}: {error}; write for example shapes:train") from error
    return Path(expand(source))
