"""The entries of JSON: an object a line (.jsonl), or a list of objects or of texts (.json).

`datasets` writes JSON Lines to files that it calls .json, which are read as such.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowbp_ray.prompt_sources.text import lines_in, text_in
from flowbp_ray.utils.text_files import lines_of, shown

EXAMPLE = '{"prompt": "a cat"}'

Row = tuple[str, dict[str, Any]]
"""Where an entry is ("entry 3"), and its fields."""


def jsonl_entries(path: Path, what: str, column: str) -> Iterator[Row]:
    """An object on each line; blank lines are passed over."""
    yield from _of_lines(lines_in(path, what), what)


def json_entries(path: Path, what: str, column: str) -> Iterator[Row]:
    """The objects or texts of one list, or an object on each line. A text has no more columns than a line of .txt."""
    text = text_in(path, what)
    first, _, rest = text.strip().partition("\n")
    if _is_object(first, column, alone=not rest):
        yield from _of_lines(lines_of(text), what)
        return
    try:
        entries = json.loads(text, object_pairs_hook=_once) if first else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error}); write a list such as [{EXAMPLE}]") from error
    if not isinstance(entries, list):
        raise ValueError(f"{what} holds {_top(entries)}; write a list such as [{EXAMPLE}]{_within(entries)}")
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, str) and column != "prompt":
            raise ValueError(f"{what}, entry {number} is a text, which has no columns; write an object, or read it "
                             "without columns={prompt: NAME}")  # fmt: skip
        if not isinstance(entry, dict | str):
            raise ValueError(
                f"{what}, entry {number} holds {shown(entry)}; write a text, or an object such as {EXAMPLE}"
            )
        yield f"entry {number}", {"prompt": entry} if isinstance(entry, str) else entry


def _of_lines(lines: list[str], what: str) -> Iterator[Row]:
    entry = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry += 1
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{what}, line {number} is not JSON ({error}); write an object such as {EXAMPLE} on each line"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{what}, line {number} holds {shown(row)}; write an object such as {EXAMPLE}")
        yield f"entry {entry}" + (f" (line {number})" if number != entry else ""), row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values under one key Python would silently take the second."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(shown(k) for k in keys if keys.count(k) > 1)
        raise ValueError(f"key {twice} is there twice in {shown(found)}")
    return found


def _is_object(line: str, column: str, alone: bool) -> bool:
    """Whether a file's first line is an object as .jsonl has them. One that is alone must hold a prompt: otherwise it
    is a whole file that holds its entries deeper."""
    if not line.startswith("{"):
        return False
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and (not alone or isinstance(row.get(column), str))


def _top(found: Any) -> str:
    return f"an object with {shown(sorted(found))}" if isinstance(found, dict) else shown(found)


def _within(found: Any) -> str:
    """Advice for an object with a list of objects, as the captions of COCO are: that list alone."""
    inner = found.items() if isinstance(found, dict) else ()
    lists = [name for name, value in inner if isinstance(value, list) and value and isinstance(value[0], dict | str)]
    name = "annotations" if "annotations" in lists else lists[0] if lists else ""
    return f": that under {shown(name)} alone" if name else ""
