"""Files of prompts: .txt, .jsonl, .csv, .tsv and .parquet read alike; what cannot be read is named by file and entry.

All kinds are UTF-8, blanks around a prompt are cut off, and an entry with nothing else is left out.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.text_files import check_unicode, read_lines, read_text, shown

LONGEST = 100_000  # characters of a prompt; no text encoder reads a hundredth of it
CSV_FIELD = 1 << 30  # characters; csv's own limit would end in a message without a line

Row = tuple[str, dict[str, Any]]
"""Where an entry is ("entry 3"), and its fields."""


@dataclass(frozen=True)
class PromptRecord:
    """One prompt. extra: the other fields of its line, such as a skill or a claim for the verifier."""

    text: str
    extra: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def skill(self) -> str:
        """The prompt's `skill`, `tag` (GenEval) or `category` (PartiPrompts), or "": what evaluations are split by."""
        return str(next((self.extra[key] for key in ("skill", "tag", "category") if key in self.extra), ""))


def load(source: str, key: str = "") -> list[PromptRecord]:
    """Read prompts from a .txt (one a line), .jsonl, .csv, .tsv or .parquet file (`prompt`), or "shapes:<split>".

    key: of the configuration that names the file, for messages. Raises ValueError, with the file's name and the line
    or entry, where a prompt is missing or cannot be read.
    """
    path, what = _resolve(source), f"{key + ': ' if key else ''}prompts file {source}"
    if path.suffix not in READERS:
        raise ValueError(f"{what} ends in {path.suffix!r}; write a {KINDS} file")
    if not path.is_file():
        why = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{what} {why}; write the path of a {KINDS} file")
    records = [
        record for where, row in READERS[path.suffix](path, what) if (record := _record(row, f"{what}, {where}"))
    ]
    if not records:
        raise ValueError(f"{what} holds no prompt; write at least one")
    return records


def _record(row: dict[str, Any], what: str) -> PromptRecord | None:
    """An entry as a record; None where its prompt is blank."""
    if not isinstance(row.get("prompt"), str):
        if "prompt" in row:
            raise ValueError(
                f"{what}: 'prompt' must be a text, got {shown(row['prompt'])}; write one, or leave the entry out"
            )
        keys = [str(key) for key in row]
        similar = next((k for k in keys if k.strip().lower() in ALIKE), None)
        advice = f"rename {similar!r} to 'prompt'" if similar is not None else "write the text under 'prompt'"
        raise ValueError(f"{what}: no text under 'prompt', only {shown(sorted(keys))}; {advice}")
    check_unicode(row, what)
    text = row["prompt"].strip()
    if len(text) > LONGEST:
        raise ValueError(
            f"{what}: a prompt of {len(text)} characters ({shown(text[:40])}); at most {LONGEST} are read, write each "
            "prompt as an entry of its own"
        )
    return PromptRecord(text, {k: v for k, v in row.items() if k != "prompt"}) if text else None


def _txt(path: Path, what: str) -> Iterator[Row]:
    for number, line in enumerate(read_lines(path, what), 1):
        yield f"line {number}", {"prompt": line}


def _jsonl(path: Path, what: str) -> Iterator[Row]:
    entry = 0
    for number, line in enumerate(read_lines(path, what), 1):
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
        raise ValueError(f"key {next(shown(k) for k in keys if keys.count(k) > 1)} is there twice")
    return found


def _csv(path: Path, what: str) -> Iterator[Row]:
    """Comma-separated, quoted as spreadsheets do, with the names of the columns in the first line."""
    csv.field_size_limit(CSV_FIELD)
    reader = csv.DictReader(io.StringIO(read_text(path, what), newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        if names and "prompt" not in names:
            raise ValueError(f"no column is called prompt, only {shown(list(names))}; write the columns' names first")
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have one name: {shown(list(names))}; rename one")
        for row in reader:
            if None in row:
                raise ValueError('more fields than columns; write a text with commas in "quotes"')
            yield f"line {reader.line_num}", {name: value for name, value in row.items() if value is not None}
    except csv.Error as error:
        line = max(reader.line_num, 1)
        raise ValueError(f"{what}, line {line}: {error}; write a quote within quotes twice, and close them") from error
    except ValueError as error:
        raise ValueError(f"{what}, line {max(reader.line_num, 1)}: {error}") from error


def _tsv(path: Path, what: str) -> Iterator[Row]:
    """Separated by tabs and without quoting, as PartiPrompts is; upper case in the columns' names does not count."""
    lines = read_lines(path, what)
    names = [name.strip().lower() for name in lines[0].split("\t")] if lines else []
    if lines and "prompt" not in names:
        raise ValueError(
            f"{what}, line 1: no column is called prompt, only {shown(names)}; write the columns' names first"
        )
    if names.count("prompt") > 1:
        raise ValueError(f"{what}, line 1: two columns have one name: {shown(names)}; rename one")
    for number, line in enumerate(lines[1:], 2):
        fields = line.split("\t")
        if len(fields) > len(names):
            raise ValueError(
                f"{what}, line {number}: more fields than columns; write a space for a tab within a prompt"
            )
        yield f"line {number}", dict(zip(names, fields, strict=False)) if line.strip() else {"prompt": ""}


def _parquet(path: Path, what: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        names = parquet.read_schema(path).names
        if "prompt" not in names:
            _record(dict.fromkeys(names), what)
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"{what} cannot be read as parquet ({reason}); write it again, or as .jsonl") from error
    for number, row in enumerate(rows, 1):
        yield f"entry {number}", row


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": _txt,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
KINDS = ".txt, .jsonl, .csv, .tsv or .parquet"
EXAMPLE = '{"prompt": "a cat"}'
ALIKE = ("prompt", "prompts", "text", "caption", "captions", "query", "instruction")


def _resolve(source: str) -> Path:
    if source.startswith("shapes:"):
        from flowbp_ray.shapes import prompt_file

        try:
            return Path(prompt_file(source.removeprefix("shapes:")))
        except ValueError as error:
            raise ValueError(f"prompts {shown(source)}: {error}; write for example shapes:train") from error
    return Path(expand(source))
