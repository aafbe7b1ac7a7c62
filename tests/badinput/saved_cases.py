"""Datasets that the `datasets` library saved, as copies and other tools leave them; and files of Arrow's that are odd.

`tests/data/prompts` has two that the library itself wrote. What it would not write is written by pyarrow.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.preflight import Checked
from tests.badinput.data_cases import A, B, C
from tests.badinput.outcome import Case
from tests.paths import DATA
from tests.small import small_overrides

KIND = "saved dataset"
SAVED, SPLITS = DATA / "prompts" / "saved", DATA / "prompts" / "saved_splits"
FIRST, SECOND = "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"
GOOD = [A, B]
CAPTION = "columns={prompt: caption}"


def _cut(file: Path, size: int) -> None:
    """Leave so many bytes of a file; below 0, leave them out at its end."""
    file.write_bytes(file.read_bytes()[:size])


def _changed(file: Path, found: bytes, other: bytes) -> None:
    raw = file.read_bytes()
    assert raw.count(found) >= 1 and len(found) == len(other)
    file.write_bytes(raw.replace(found, other))


def _state(folder: Path, **changed: Any) -> None:
    file = folder / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def _splits(folder: Path, value: Any) -> None:
    (folder / "dataset_dict.json").write_text(json.dumps(value))


SHARDS: dict[str, Callable[[Path], Any]] = {
    "a shard missing": lambda d: (d / SECOND).unlink(),
    "a link to nowhere": lambda d: ((d / SECOND).unlink(), (d / SECOND).symlink_to("nowhere.arrow")),
    "a shard cut in its data": lambda d: _cut(d / FIRST, -200),
    "a shard cut in its schema": lambda d: _cut(d / FIRST, 100),
    "a shard cut after its rows": lambda d: _cut(d / FIRST, -8),
    "a shard cut before its rows": lambda d: _cut(d / FIRST, _schema_size(d / FIRST)),
    "an empty shard": lambda d: _cut(d / SECOND, 0),
    "a shard of zeros": lambda d: (d / FIRST).write_bytes(bytes(1656)),
    "a page of HTML": lambda d: (d / FIRST).write_text("<!DOCTYPE html><html>404</html>"),
    "a pointer of git-lfs": lambda d: (d / FIRST).write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n"),
    "bytes that are not UTF-8": lambda d: _changed(d / FIRST, b"a red circle", b"a red \xffircle"),
    "an offset beyond the texts": lambda d: _changed(
        d / FIRST, b"\0\0\0\0\x0c\0\0\0\x1c\0\0\0", b"\0\0\0\0\x0c\0\0\0\xff\xff\xff\x6f"
    ),
    "another schema in the second": lambda d: _write(d / SECOND, {"text": GOOD}),
    "a state.json without files": lambda d: (d / "state.json").write_text("{}"),
    "no state.json, and a shard cut": lambda d: ((d / "state.json").unlink(), _cut(d / SECOND, -8)),
    "an empty state.json": lambda d: (d / "state.json").write_text(""),
    "a list as state.json": lambda d: (d / "state.json").write_text("[]"),
    "files that are a number": lambda d: _state(d, _data_files=3),
    "files that are true": lambda d: _state(d, _data_files=True),
    "files that are names": lambda d: _state(d, _data_files=[FIRST, SECOND]),
    "files without names": lambda d: _state(d, _data_files=[{"name": FIRST}]),
    "no files": lambda d: _state(d, _data_files=[]),
    "a file elsewhere": lambda d: _state(d, _data_files=[{"filename": "../../etc/passwd"}]),
    "a file of another kind": lambda d: (
        _state(d, _data_files=[{"filename": "data.bin"}]),
        (d / FIRST).rename(d / "data.bin"),
    ),
    "rows of a selection apart": lambda d: _state(d, _indices_data_files=[{"filename": "indices.arrow"}]),
}
"""What is done to a copy of a dataset of two shards."""

DICTS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "no split chosen": ("", lambda d: None),
    "another split": ("split=validation", lambda d: None),
    "a split in upper case": ("split=Train", lambda d: None),
    "a slice of a split": ("split=train[:50%]", lambda d: None),
    "a split elsewhere": ("split=../saved", lambda d: None),
    "a split that is not listed": ("split=test", lambda d: _splits(d, {"splits": ["train"]})),
    "a split without a folder": ("split=test", lambda d: shutil.rmtree(d / "test")),
    "a split without state.json": ("split=test", lambda d: (d / "test" / "state.json").unlink()),
    "a split without its shard": ("split=test", lambda d: next((d / "test").glob("*.arrow")).unlink()),
    "no splits": ("split=test", lambda d: _splits(d, {"splits": []})),
    "splits that are a word": ("split=test", lambda d: _splits(d, {"splits": "test"})),
    "no key of splits": ("split=test", lambda d: _splits(d, {})),
    "a list as dataset_dict.json": ("split=test", lambda d: _splits(d, ["test"])),
    "a torn dataset_dict.json": ("split=test", lambda d: (d / "dataset_dict.json").write_text('{"splits": ["tr')),
}
"""A choice, and what is done to a copy of a dataset of two splits."""

NULLS = pa.nulls(2)
TABLES: dict[str, tuple[str, dict[str, Any], list[str] | None]] = {
    "texts": ("", {"caption": GOOD}, GOOD),
    "long texts": ("", {"caption": pa.array(GOOD, pa.large_string())}, GOOD),
    "views of texts": ("", {"caption": pa.array(GOOD, pa.string_view())}, GOOD),
    "texts by number": ("", {"caption": pa.array(GOOD).dictionary_encode()}, GOOD),
    "numbers": ("", {"caption": [1, 2]}, None),
    "numbers of classes": ("where={kind: color}", {"caption": GOOD, "kind": [0, 1]}, None),
    "bytes": ("", {"caption": [b"a red circle", b"a star"]}, None),
    "lists of texts": ("", {"caption": [[A], [B, C]]}, None),
    "mappings": ("", {"caption": [{"en": A}, {"en": B}]}, None),
    "messages": ("", {"caption": [[{"role": "user", "content": A}]] * 2}, None),
    "a null": ("", {"caption": [A, None]}, None),
    "a column of nulls": ("", {"caption": NULLS}, None),
    "a column of nulls as texts": ("", {"caption": pa.array([None, None], pa.string())}, None),
    "skills that are nulls": ("", {"caption": GOOD, "skill": NULLS}, GOOD),
    "where, nulls": ("where={kind: color}", {"caption": GOOD, "kind": NULLS}, None),
    "weights, nulls": ("weights=w", {"caption": GOOD, "w": NULLS}, None),
    "weights, decimal": ("weights=w", {"caption": GOOD, "w": pa.array([1, 2], pa.decimal128(5, 2))}, GOOD),
    "weights, dates": ("weights=w", {"caption": GOOD, "w": pa.array([1, 2], pa.date32())}, None),
    "dates beyond all years": ("", {"caption": GOOD, "at": pa.array([2**61, 0], pa.timestamp("s"))}, None),
    "times of no zone": ("", {"caption": GOOD, "at": pa.array([1, 2], pa.timestamp("s", "Nowhere/Near"))}, None),
    "no rows": ("", {"caption": pa.array([], pa.string())}, None),
    "no columns": ("", {}, None),
    "another column": ("", {"text": GOOD}, None),
    "pictures alone": ("", {"image": [{"bytes": b"\x89PNG", "path": "a.png"}] * 2}, None),
    "pictures beside": ("", {"caption": GOOD, "image": [{"bytes": b"\x89PNG", "path": "a.png"}] * 2}, GOOD),
}
"""A choice beside the column `caption`, the columns of a table -> the prompts that are read, None: it is refused."""


def saved_cases(folder: Path) -> Iterator[Case]:
    """Copies of datasets with each harm done; then datasets of one table each."""
    yield _case("whole", [f"data.prompts={SAVED}", f"data.{CAPTION}"], [A, B, C, A])
    yield _case("whole, of two splits", [f"data.prompts={SPLITS}", f"data.{CAPTION}", "data.split=test"], [B])
    yield _case("its folder's files", [f"data.prompts={SAVED}/*.arrow", f"data.{CAPTION}"], [A, B, C, A])
    yield _case("split of one without", [f"data.prompts={SAVED}", f"data.{CAPTION}", "data.split=train"], None)
    yield _case("split of a pattern", [f"data.prompts={SAVED}/*.arrow", f"data.{CAPTION}", "data.split=train"], None)
    for number, (name, harm) in enumerate(SHARDS.items()):
        copy = folder / f"saved{number}"
        shutil.copytree(SAVED, copy)
        harm(copy)
        yield _case(name, [f"data.prompts={copy}", f"data.{CAPTION}"], None, copy.name)
    for number, (name, (choice, harm)) in enumerate(DICTS.items()):
        copy = folder / f"splits{number}"
        shutil.copytree(SPLITS, copy)
        harm(copy)
        chosen = [f"data.{choice}"] if choice else []
        yield _case(name, [f"data.prompts={copy}", f"data.{CAPTION}", *chosen], None, copy.name)
        if choice:
            evaluated = [f"evaluation.prompts={copy}", f"evaluation.{CAPTION}", f"evaluation.{choice}"]
            yield _case(f"{name}, to evaluate on", evaluated, None, copy.name)
    yield from _tables(folder)


def _tables(folder: Path) -> Iterator[Case]:
    for number, (name, (choice, columns, expected)) in enumerate(TABLES.items()):
        dataset = folder / f"table{number}"
        dataset.mkdir()
        _write(dataset / "data.arrow", columns)
        (dataset / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
        chosen = [f"data.{choice}"] if choice else []
        yield _case(name, [f"data.prompts={dataset}", f"data.{CAPTION}", *chosen], expected, dataset.name)
    twice = folder / "twice.arrow"
    _save(twice, pa.table([GOOD, GOOD], ["caption", "caption"]))
    yield _case("two columns of one name", [f"data.prompts={twice}", f"data.{CAPTION}"], None, twice.name)
    for name, source in {
        "of the Hub, without a name": "hf://datasets/owner",
        "of the Hub, not a dataset": "hf://owner/name",
        "of the Hub, a revision twice": "hf://datasets/owner/name@a@b",
        "of the Hub, a name that none has": "hf://datasets/../..",
    }.items():
        yield _case(name, [f"data.prompts={source}"], None, source)


def _schema_size(file: Path) -> int:
    """The bytes of a stream's first message: where its rows begin."""
    with pa.memory_map(str(file)) as mapped, ipc.open_stream(mapped):
        return int(mapped.tell())


def _write(file: Path, columns: dict[str, Any]) -> None:
    _save(file, pa.table(columns))


def _save(file: Path, table: pa.Table) -> None:
    """In Arrow's stream format, as `datasets` does."""
    with ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def _case(name: str, choices: Sequence[str], expected: list[str] | None, source: str = "data.") -> Case:
    overrides = [*small_overrides(Path.cwd()), "encoder.cache=null", *choices]
    names = [source, "data.", "evaluation."]
    if expected is None:
        return Case(KIND, name, "shapes_flowbp_sparse", overrides, names, None, "refuse")

    def right(_: RunConfig, checked: Checked) -> bool:
        read = checked.training
        return [record.text for record in read] == expected and "None" not in {record.skill for record in read}

    return Case(KIND, name, "shapes_flowbp_sparse", overrides, names, right, "accept")
