"""Text files of users: UTF-8 with or without a byte-order mark, and lines that end at \\n or \\r\\n only."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_SHOWN = 80  # characters of a value in a message


def read_text(path: Path, what: str) -> str:
    """The text of a file in UTF-8, without a byte-order mark.

    what: says which file it is, for messages: "prompts file p.txt". Raises ValueError, with the line's number, where a
    byte is not UTF-8; OSError where the file cannot be read.
    """
    return decoded(path.read_bytes(), what)


def decoded(raw: bytes, what: str) -> str:
    """The text that a file's bytes are, as `read_text` says."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{what} is UTF-16; save it as UTF-8") from error
        line = raw.count(b"\n", 0, error.start) + 1
        byte = f"0x{raw[error.start]:02x}"
        raise ValueError(f"{what}, line {line}: byte {byte} is not UTF-8; save the file as UTF-8") from error


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a file as `read_text` reads it, without their ends. Other separators of Unicode end no line."""
    return lines_of(read_text(path, what))


def lines_of(text: str) -> list[str]:
    """The lines of a text, as `read_lines` says."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file as `read_text` reads it. Raises ValueError, one line, where there is none."""
    text = read_text(path, what)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({error}); write it again, or download it") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no JSON object, but {shown(found)}; write {{...}}, or download it again")
    return found


def check_unicode(value: Any, what: str) -> None:
    """Raise ValueError where a text, or one inside lists and mappings, holds half of a surrogate pair.

    JSON can spell it (a cut off emoji), and so can a command line that is not UTF-8; no file could store it.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(f"{what}: {half} at character {error.start + 1} is half of a character; write it whole, "
                             "or leave it out") from error  # fmt: skip
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_unicode(key, what)
            check_unicode(inner, what)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_unicode(inner, what)


def plain(name: str, most: int = MOST_SHOWN) -> str:
    """A name as it is, or as `shown` writes it where it would break a message's line or is longer than `most`."""
    return name if len(name) <= most and name.isprintable() else shown(name)


def shown(value: Any) -> str:
    """A value as Python writes it, on one line, cut after MOST_SHOWN characters."""
    text = repr(value[: 2 * MOST_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
