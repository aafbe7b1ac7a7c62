"""The entries of JSON: an object a line (.jsonl), or a list of objects or of texts (.json).

`datasets` writes JSON Lines to files that it calls .json, which are read as such. One object alone, on however many
lines, is one entry unless it holds its entries deeper.
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
    """The objects or texts of one list, one object, or an object on each line.

    A text has no more columns than a line of .txt.
    """
    text = text_in(path, what)
    first, _, rest = text.strip().partition("\n")
    if rest and _is_object(first):
        yield from _of_lines(lines_of(text), what)
        return
    try:
        entries = json.loads(text, object_pairs_hook=_once) if first else []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error}); write a list such as [{EXAMPLE}]") from error
    if isinstance(entries, dict) and _is_entry(entries, column):
        yield "entry 1", entries
        return
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


def _is_object(line: str) -> bool:
    """Whether a file's first line is an object as .jsonl has them."""
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_entry(found: dict[str, Any], column: str) -> bool:
    """Whether a file's one object is an entry, maybe one without the prompts' column, and holds none deeper."""
    if _lists(found, dict):
        return False
    if column in found:
        return isinstance(found[column], str)
    return not _lists(found, str) or any(isinstance(value, str) for value in found.values())


def _lists(found: dict[str, Any], kind: type) -> list[str]:
    """The keys of an object under which there are lists of objects (dict) or of texts (str)."""
    return [name for name, value in found.items() if isinstance(value, list) and value and isinstance(value[0], kind)]


def _top(found: Any) -> str:
    return f"an object with {shown(sorted(found))}" if isinstance(found, dict) else shown(found)


def _within(found: Any) -> str:
    """Advice for an object with a list of objects, as the captions of COCO are: that list alone."""
    lists = _lists(found, dict) or _lists(found, str) if isinstance(found, dict) else []
    name = "annotations" if "annotations" in lists else lists[0] if lists else ""
    return f": that under {shown(name)} alone" if name else ""
