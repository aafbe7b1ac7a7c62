"""Wrong configurations: YAML files that were mutated, and values of every type under every key."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.preflight import Checked
from tests.badinput.outcome import Case, flat
from tests.small import small_config

VALUES = (
    """
null|~||true|no|0|-1|1|3|007|0x10|1e3|1e-4|.5|1_000|12:30|2025-01-01|.inf|-.inf|.nan|99999999999999999999|1e400|"text"
'quoted'|text|[]|[1, 2]|[null]|{}|{a: 1}|{1: 2}|[[[]]]|!!binary aGk=|!!python/object:os.system x|!!set {a}
!!timestamp 2025-01-01|&a 1|*a|? x|@at|`tick|%percent|${seed}|${nothing}|${oc.env:NOWHERE}|${unclosed|"\\ud83d"
"\\x00"|~/file|~nobody/file|a # comment|a #b|a: b|- 1|"open|{open|[open|>|<<: 1|é|日本語|🔴|???|\t1|=|NULL|NaN|inf|None
""".strip()
    .replace("\n", "|")
    .split("|")
)


def base(folder: Path) -> str:
    """A whole configuration, every key of it, as a run writes it down."""
    return loading.dump(small_config(folder, "flowbp_sparse", f"encoder.cache={folder}/cache", "name=base"))


def mutated(folder: Path, count: int, seed: int = 17) -> Iterator[Case]:
    """`count` files, each with one to three mutations of `base`."""
    draws, text = random.Random(seed), base(folder)
    for number in range(count):
        raw = text.encode()
        done = []
        for _ in range(draws.choice((1, 1, 1, 2, 3))):
            how = draws.choice(MUTATIONS)
            raw = how(raw, draws)
            done.append(how.__name__.strip("_"))
        file = folder / f"m{number}.yaml"
        file.write_bytes(raw)
        yield Case(
            "YAML file, mutated", f"{number} {'+'.join(done)}", file, names=[file.name, *words()], right=says(raw)
        )


def words() -> list[str]:
    """The names of all keys: a refusal names one, or the file."""
    return [name for name in RunConfig.model_fields if len(name) > 3]


def says(raw: bytes) -> Callable[[RunConfig, Checked], bool]:
    """Whether a configuration has what the file says, by a reader that takes every scalar for text."""

    def right(config: RunConfig, _: Checked) -> bool:
        told = yaml.load(raw.decode("utf-8-sig"), yaml.BaseLoader)
        read = flat(config.model_dump(mode="json"))
        return all(
            same(str(value), read[key]) for key, value in flat(told).items() if key in read and value not in ([], {})
        )

    return right


def same(told: str, read: Any) -> bool:
    """Whether a scalar of the file means the value that was read. ${...} stands for another key; null is `none` too."""
    if told.startswith("${"):
        return True
    if read is None or (read == "none" and told != read):
        return told.lower() in ("", "~", "null")
    if isinstance(read, bool):
        return told.lower() in (("true", "yes", "on", "1", "1.0") if read else ("false", "no", "off", "0", "0.0"))
    if isinstance(read, int | float):
        plain = told.replace("_", "")
        try:
            number = float(int(plain, 0)) if plain.lower().startswith("0x") else float(plain)
        except ValueError:
            return False
        return number == float(read) or abs(number - read) < 1e-9 * abs(number)
    return told.replace("\\${", "${") == read or told.startswith("~/") or read.endswith(told.strip("./"))


def _line(raw: bytes, draws: random.Random, change: Callable[[bytes], bytes]) -> bytes:
    lines = raw.split(b"\n")
    at = draws.randrange(len(lines))
    lines[at] = change(lines[at])
    return b"\n".join(lines)


def _value(raw: bytes, draws: random.Random) -> bytes:
    def change(line: bytes) -> bytes:
        key, colon, _ = line.partition(b":")
        return key + colon + b" " + draws.choice(VALUES).encode() if colon else line

    return _line(raw, draws, change)


def _delete(raw: bytes, draws: random.Random) -> bytes:
    lines = raw.split(b"\n")
    del lines[draws.randrange(len(lines))]
    return b"\n".join(lines)


def _twice(raw: bytes, draws: random.Random) -> bytes:
    return _line(raw, draws, lambda line: line + b"\n" + line)


def _swap(raw: bytes, draws: random.Random) -> bytes:
    lines = raw.split(b"\n")
    a, b = draws.randrange(len(lines)), draws.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def _indent(raw: bytes, draws: random.Random) -> bytes:
    return _line(raw, draws, lambda line: draws.choice((b" ", b"  ", b"\t", b"    ")) + line)


def _outdent(raw: bytes, draws: random.Random) -> bytes:
    return _line(raw, draws, bytes.lstrip)


def _misspell(raw: bytes, draws: random.Random) -> bytes:
    def change(line: bytes) -> bytes:
        key, colon, rest = line.partition(b":")
        at = draws.randrange(len(key) + 1)
        return key[:at] + draws.choice((b"", b"x", b"_", b"S")) + key[at + 1 :] + colon + rest

    return _line(raw, draws, change)


def _byte(raw: bytes, draws: random.Random) -> bytes:
    at = draws.randrange(len(raw))
    return raw[:at] + bytes([draws.randrange(256)]) + raw[at + 1 :]


def _insert(raw: bytes, draws: random.Random) -> bytes:
    at = draws.randrange(len(raw))
    odd = (
        b"\x00",
        b"\x07",
        b"\xff",
        b"\xc3",
        b"\xe2\x80\xa8",
        b"\xef\xbb\xbf",
        b'"',
        b"{",
        b"]",
        b"|",
        b"&",
        b"*",
        b"\r",
        b"#",
    )
    return raw[:at] + draws.choice(odd) + raw[at:]


def _cut(raw: bytes, draws: random.Random) -> bytes:
    return raw[: draws.randrange(len(raw))]


def _unknown(raw: bytes, draws: random.Random) -> bytes:
    return _line(raw, draws, lambda line: line[: len(line) - len(line.lstrip())] + b"learning_rate: 1\n" + line)


def _harmless(raw: bytes, draws: random.Random) -> bytes:
    how = draws.randrange(5)
    if how == 0:
        return raw.replace(b"\n", b"\r\n")
    if how == 1:
        return b"\xef\xbb\xbf" + raw
    if how == 2:
        return _line(raw, draws, lambda line: b"# a comment\n" + line)
    if how == 3:
        return b"---\n" + raw + b"...\n"
    return raw + b"\n\n"


def _coded(raw: bytes, draws: random.Random) -> bytes:
    return raw.decode("utf-8", "replace").encode(draws.choice(("utf-16", "utf-16-be", "utf-32", "utf-8-sig")))


def _documents(raw: bytes, draws: random.Random) -> bytes:
    return raw + draws.choice(
        (b"\n---\nsteps: 3\n", b"\n...\nmore\n", b"\nextends: nothing.yaml\n", b"\n- item\n", b"\nplain\n")
    )


MUTATIONS = [_value] * 8 + [_misspell] * 3 + [_byte, _insert] * 2
MUTATIONS += [_delete, _twice, _swap, _indent, _outdent, _cut, _unknown, _harmless, _coded, _documents]


def keys(plain: Mapping[str, Any]) -> list[str]:
    """The dotted names of all scalars, lists of no mappings, and sections of a configuration."""
    leaves = [key for key in flat(dict(plain)) if not any(part.isdigit() for part in key.split("."))]
    sections = {".".join(key.split(".")[:depth]) for key in leaves for depth in range(1, key.count(".") + 1)}
    return sorted({*leaves, *sections})


def with_value(plain: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of nested mappings with another value under a dotted key."""
    first, _, rest = key.partition(".")
    inner = plain.get(first)
    return {**plain, first: with_value(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}
