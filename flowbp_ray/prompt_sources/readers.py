"""The entries of a file of prompts: .txt, .jsonl, .json, .csv, .tsv, .parquet or .arrow, each with where it stands.

All kinds are UTF-8, and those of text may be packed by gzip. A reader takes the path, what to call the file in
messages, and the column of the prompts. It raises ValueError, with the line or entry, for what cannot be read.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flowbp_ray.prompt_sources.json_entries import Row, json_entries, jsonl_entries
from flowbp_ray.prompt_sources.text import GZIP, lines_in, text_in
from flowbp_ray.utils.text_files import plain, shown

CSV_FIELD = 1 << 30  # characters; csv's own limit would end in a message without a line
CONTINUES = b"\xff\xff\xff\xff"  # how a message of Arrow's stream format begins, but in its first version
KINDS = ".txt, .jsonl, .json, .csv, .tsv (each as .gz too), .parquet or .arrow"


def _txt(path: Path, what: str, column: str) -> Iterator[Row]:
    for number, line in enumerate(lines_in(path, what), 1):
        yield f"line {number}", {"prompt": line}


def _csv(path: Path, what: str, column: str) -> Iterator[Row]:
    """Comma-separated, quoted as spreadsheets do, with the names of the columns in the first line."""
    csv.field_size_limit(CSV_FIELD)
    reader = csv.DictReader(io.StringIO(text_in(path, what), newline=""), strict=True)
    try:
        names = reader.fieldnames or []
        if names and column not in names:
            raise ValueError(
                f"no column is called {plain(column)}, only {shown(list(names))}; write the columns' names first, or "
                "columns={prompt: NAME} beside the file"
            )
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


def _tsv(path: Path, what: str, column: str) -> Iterator[Row]:
    """Separated by tabs and without quoting, as PartiPrompts is; upper case in the columns' names does not count."""
    lines = lines_in(path, what)
    names = [name.strip().lower() for name in lines[0].split("\t")] if lines else []
    if lines and column not in names:
        raise ValueError(
            f"{what}, line 1: no column is called {plain(column)}, only {shown(names)}; write the columns' names "
            "first, or columns={prompt: NAME} beside the file"
        )
    if names.count(column) > 1:
        raise ValueError(f"{what}, line 1: two columns have one name: {shown(names)}; rename one")
    for number, line in enumerate(lines[1:], 2):
        fields = line.split("\t")
        if len(fields) > len(names):
            raise ValueError(
                f"{what}, line {number}: more fields than columns; write a space for a tab within a prompt"
            )
        yield f"line {number}", dict(zip(names, fields, strict=False)) if line.strip() else {column: ""}


def _parquet(path: Path, what: str, column: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path, columns=_readable(parquet.read_schema(path), what, column))
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise _unreadable(what, "parquet", error) from error
    yield from _rows(table, what, "parquet")


def _arrow(path: Path, what: str, column: str) -> Iterator[Row]:
    """Arrow's stream format, which `datasets` writes, or its file format. The file is mapped, not copied.

    A stream that lacks the mark of its end is refused: the format allows that, but it is also what is left of one that
    was cut between two batches, or is still being written.
    """
    import pyarrow
    from pyarrow import ipc

    try:
        mapped = pyarrow.memory_map(str(path))
        with mapped:
            first = mapped.read(6)
            stream = first != b"ARROW1"
            mapped.seek(0)
            table = (ipc.open_stream(mapped) if stream else ipc.open_file(mapped)).read_all()
            if stream and not _ended(mapped, first):
                raise ValueError(f"{what} lacks the mark of its end, so it may not be whole; save or copy it again, "
                                 "or if the writer was closed on purpose without it, write it as parquet")  # fmt: skip
            table = table.select(_readable(table.schema, what, column))
            table.validate(full=True)  # an offset that points beyond the file would be followed
            yield from _rows(table, what, "arrow")
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise _unreadable(what, "arrow", error) from error


def _ended(stream: Any, first: bytes) -> bool:
    """Whether a stream that has been read ended in a mark, a message of no bytes, begun as the first one is.

    Messages fill eights of bytes, which tells a mark from a column that ends in the same bytes. Only zeros may follow,
    with which some writers fill their files.
    """
    mark = (CONTINUES if first.startswith(CONTINUES) else b"") + bytes(4)
    if stream.tell() % 8 != len(mark) % 8:
        return False
    stream.seek(stream.tell() - len(mark))
    return bool(stream.read(len(mark)) == mark) and not stream.read().strip(b"\0")


def _readable(schema: Any, what: str, column: str) -> list[str]:
    """The columns that are read: the prompts', and all that hold no bytes, such as pictures.

    Raises ValueError where two of them have one name.
    """
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
            return True
        return any(holds_bytes(kind.field(i).type) for i in range(kind.num_fields))

    names = [field.name for field in schema if field.name == column or not holds_bytes(field.type)]
    if twice := next((name for name in names if schema.names.count(name) > 1), None):
        raise ValueError(f"{what}: two columns have one name: {shown(twice)}; rename one")
    return names


def _rows(table: Any, what: str, kind: str) -> Iterator[Row]:
    """The rows of a table; where it has none of the columns, an entry without fields says so."""
    names = table.column_names
    columns = [_column(table[name], f"{what}, column {shown(name)}", kind) for name in names]
    for number in range(table.num_rows):
        yield f"entry {number + 1}", {name: column[number] for name, column in zip(names, columns, strict=True)}


def _column(column: Any, what: str, kind: str) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, LookupError) as error:  # no UTF-8; dates of no year; time zones of no place
        raise _unreadable(what, kind, error) from error


def _unreadable(what: str, kind: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:160]
    return ValueError(f"{what} cannot be read as {kind} ({reason}); write it again, or as .jsonl")


Reader = Callable[[Path, str, str], Iterator[Row]]
OF_TEXT: dict[str, Reader] = {
    ".txt": _txt,
    ".jsonl": jsonl_entries,
    ".json": json_entries,
    ".csv": _csv,
    ".tsv": _tsv,
}
READERS: dict[str, Reader] = {
    **OF_TEXT,
    **{kind + GZIP: reader for kind, reader in OF_TEXT.items()},
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""What `kind_of` a file says -> its reader."""
