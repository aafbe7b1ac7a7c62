"""Prompt files as people have them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from tests.badinput.outcome import Case
from tests.small import small_overrides

A, B = "a red circle", "two blue squares"
GOOD = [A, B]

TEXTS: dict[str, tuple[str, bytes, list[str] | None]] = {
    "empty": ("txt", b"", None),
    "blank lines only": ("txt", b"\n \n\t\n", None),
    "a line of 10 MB": ("txt", b"red " * 2_500_000, None),
    "a line of 10 MB in JSON": ("jsonl", json.dumps({"prompt": "red " * 2_500_000}).encode(), None),
    "invalid UTF-8": ("txt", b"a red circle\na blue \x92 square\n", None),
    "invalid UTF-8 in JSON": ("jsonl", b'{"prompt": "a \xff"}\n', None),
    "UTF-16": ("txt", "a red circle\n".encode("utf-16"), None),
    "UTF-16 in CSV": ("csv", "prompt\na red circle\n".encode("utf-16"), None),
    "BOM": ("txt", b"\xef\xbb\xbf" + b"a red circle\ntwo blue squares\n", GOOD),
    "BOM in JSON": ("jsonl", b"\xef\xbb\xbf" + b'{"prompt": "a red circle"}\n{"prompt": "two blue squares"}', GOOD),
    "BOM in CSV": ("csv", b"\xef\xbb\xbf" + b"prompt\na red circle\ntwo blue squares\n", GOOD),
    "CRLF": ("txt", b"a red circle\r\ntwo blue squares\r\n", GOOD),
    "CRLF in JSON": ("jsonl", b'{"prompt": "a red circle"}\r\n\r\n{"prompt": "two blue squares"}\r\n', GOOD),
    "CRLF in CSV": ("csv", b"prompt,id\r\na red circle,1\r\ntwo blue squares,2\r\n", GOOD),
    "blanks around": ("txt", b"  a red circle \n\n\ttwo blue squares\n", GOOD),
    "blanks around in JSON": (
        "jsonl",
        b'{"prompt": " a red circle "}\n{"prompt": ""}\n{"prompt": "two blue squares"}',
        GOOD,
    ),
    "blanks around in CSV": ("csv", b'prompt\n" a red circle "\n""\ntwo blue squares\n', GOOD),
    "separators of Unicode": (
        "jsonl",
        '{"prompt": "a red circle\u2028"}\n{"prompt": "\u0085two blue squares"}'.encode(),
        GOOD,
    ),
    "duplicate ids": ("jsonl", b'{"id": 1, "prompt": "a red circle"}\n{"id": 1, "prompt": "two blue squares"}', GOOD),
    "duplicate prompts": ("txt", b"a red circle\na red circle\n", [A, A]),
    "a key twice": ("jsonl", b'{"prompt": "a red circle", "prompt": "two blue squares"}', None),
    "another key": ("jsonl", b'{"text": "a red circle"}', None),
    "another key, capitals": ("jsonl", b'{"Prompt": "a red circle"}', None),
    "a number": ("jsonl", b'{"prompt": 5}', None),
    "null": ("jsonl", b'{"prompt": "a red circle"}\n{"prompt": null}', None),
    "a list of prompts": ("jsonl", b'["a red circle", "two blue squares"]', None),
    "plain text in JSON": ("jsonl", b"a red circle\n", None),
    "a torn line": ("jsonl", b'{"prompt": "a red circle"}\n{"prompt": "two bl', None),
    "nested deeply": ("jsonl", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    "half an emoji": ("jsonl", b'{"prompt": "a red \\ud83d"}', None),
    "half an emoji elsewhere": ("jsonl", b'{"prompt": "a red circle", "skill": "\\udd34"}', None),
    "CSV with quotes": ("csv", b'id,prompt\n1,"a red circle"\n2,"two\nblue squares"\n', [A, "two\nblue squares"]),
    "CSV with commas and no quotes": ("csv", b"prompt\na red circle, big\n", None),
    "CSV without a header": ("csv", b"a red circle\ntwo blue squares\n", None),
    "CSV, a quote that does not close": ("csv", b'prompt\n"a red circle\n', None),
    "CSV, another column": ("csv", b"caption,id\na red circle,1\n", None),
    "CSV, two columns of one name": ("csv", b"prompt,prompt\na,b\n", None),
    "CSV, empty": ("csv", b"", None),
    "no parquet": ("parquet", b"a red circle\n", None),
    "torn parquet": ("parquet", b"PAR1 and no end", None),
    "another ending": ("xlsx", b"prompt\na red circle\n", None),
    "tabs between columns": ("tsv", b'Prompt\tNote\na red circle\t"\na square\tx "y\n', ["a red circle", "a square"]),
    "two columns of prompts": ("tsv", b"Prompt\tprompt\na red circle\ta square\n", None),
    "more tabs than columns": ("tsv", b"prompt\na red\tcircle\n", None),
    "tabs, no column of prompts": ("tsv", b"Image\tNote\na\tb\n", None),
    "JSON, not lines": ("json", b'[{"prompt": "a red circle"}, {"prompt": "two blue squares"}]', GOOD),
    "JSON, a list of texts": ("json", b'\xef\xbb\xbf["a red circle", "two blue squares"]', GOOD),
    "JSON, lines": ("json", b'{"prompt": "a red circle"}\n{"prompt": "two blue squares"}\n', GOOD),
    "JSON, one object": ("json", b'{"images": [], "annotations": [{"caption": "a red circle"}]}', None),
    "JSON, a text of 10 MB": ("json", json.dumps(["red " * 2_500_000]).encode(), None),
    "JSON, invalid UTF-8": ("json", b'["a \xff"]', None),
    "JSON, a key twice": ("json", b'[{"prompt": "a red circle", "prompt": "two blue squares"}]', None),
    "JSON, torn": ("json", b'[{"prompt": "a red circle"}, {"prompt": "two bl', None),
    "JSON, half an emoji": ("json", b'["a red \\ud83d"]', None),
    "packed": ("txt.gz", gzip.compress(b"a red circle\ntwo blue squares\n"), GOOD),
    "packed, a line of 10 MB": ("jsonl.gz", gzip.compress(json.dumps({"prompt": "red " * 2_500_000}).encode()), None),
    "packed, under another name": ("txt", gzip.compress(b"a red circle\n"), None),
    "not packed": ("csv.gz", b"prompt\na red circle\n", None),
    "packed, torn": ("csv.gz", gzip.compress(b"prompt\na red circle\n")[:-6], None),
    "words that the family lacks": ("txt", b"a photo of a dog\n", None),
    "non-Latin": ("txt", "一个红色的圆圈\n".encode(), None),
    "too long for the family": ("txt", b"a red circle " * 30 + b"\n", None),
    "NUL": ("txt", b"a red circle\n\x00\n", None),
}


BY_FAMILY = ("words that the family lacks", "non-Latin", "too long for the family", "NUL")
"""What other families would encode."""


def prompt_cases(folder: Path) -> Iterator[Case]:
    """Each file as training prompts of the embedded model; some as evaluation prompts too."""
    for number, (name, (suffix, raw, expected)) in enumerate(TEXTS.items()):
        file = folder / f"p{number}.{suffix}"
        file.write_bytes(raw)
        yield _case(folder, name, file, expected)
    tables = {
        "parquet": (pa.table({"prompt": GOOD, "id": [1, 1]}), GOOD),
        "parquet with nulls": (pa.table({"prompt": [A, None]}), None),
        "parquet, another column": (pa.table({"caption": GOOD}), None),
        "parquet of bytes": (pa.table({"prompt": [b"a", b"\xff"]}), None),
        "parquet of numbers": (pa.table({"prompt": [1, 2]}), None),
        "parquet without rows": (pa.table({"prompt": pa.array([], pa.string())}), None),
        "parquet of categories": (pa.table({"prompt": pa.array(GOOD).dictionary_encode()}), GOOD),
    }
    for number, (name, (table, expected)) in enumerate(tables.items()):
        file = folder / f"t{number}.parquet"
        parquet.write_table(table, file)
        yield _case(folder, name, file, expected)
    (folder / "folder.txt").mkdir(exist_ok=True)
    for name, source in {
        "a folder": f"{folder}/folder.txt",
        "no such file": f"{folder}/nowhere.txt",
        "no such home": "~nobody-here/p.txt",
        "an unknown split": "shapes:tain",
    }.items():
        yield Case(
            "prompt file",
            name,
            "shapes_flowbp_sparse",
            _run(folder, source),
            [source[-9:], "shapes:tain"],
            may="refuse",
        )
    held_out = [*_run(folder, str(folder / "p8.txt")), f"evaluation.prompts={folder}/p4.txt"]
    yield Case("prompt file", "held out, invalid UTF-8", "shapes_flowbp_sparse", held_out, ["p4.txt"], may="refuse")


def _run(folder: Path, source: str) -> list[str]:
    return [*small_overrides(folder), f"data.prompts={source}", f"encoder.cache={folder}/cache"]


def _case(folder: Path, name: str, file: Path, expected: list[str] | None) -> Case:
    names = [file.name, "data.prompts"]
    if expected is None:
        return Case("prompt file", name, "shapes_flowbp_sparse", _run(folder, str(file)), names, may="refuse")
    right = lambda _, checked: [record.text for record in checked.training] == expected  # noqa: E731
    return Case("prompt file", name, "shapes_flowbp_sparse", _run(folder, str(file)), names, right, "accept")
