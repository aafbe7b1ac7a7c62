"""The files that a source of prompts names: one, those that a pattern matches, a folder's, or a saved dataset's.

A folder is what `datasets` has saved (`save_to_disk`), told by its state.json or dataset_dict.json, or any other with
files of prompts of one kind. Splits of the latter are told apart by words in the files' names, as `datasets` does.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection
from pathlib import Path

from flowbp_ray.prompt_sources.text import GZIP, kind_of
from flowbp_ray.utils.text_files import plain, read_json, shown

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> the words that stand for it in the name of a file or of a folder above it."""
BESIDE = re.compile(
    r"(readme|license|licence|requirements|notice|changelog)\b|(config|state|dataset_infos?)\.json(\.gz)?$",
    re.IGNORECASE,
)
"""How files begin that lie beside data and hold none."""
BESIDE_OTHERS = (".json", f".json{GZIP}")
"""Beside files of another kind these describe them, as a file for each picture does; alone they are the data."""
SHOWN = 8  # names in a message


def is_pattern(source: str) -> bool:
    """Whether a source is a pattern for several files, and not the name of one that is there."""
    return any(letter in source for letter in "*?[") and not Path(source).exists()


def matching(pattern: str, kinds: Collection[str], what: str, split: str | None, key: str) -> list[Path]:
    """The files that a pattern matches, in the order of their names; `**` stands for any folders.

    kinds: the suffixes that can be read. what, key: name the source and its split, for messages. Raises ValueError
    where there is none, or they are of several kinds.
    """
    _no_split(split, what, key)
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not found:
        raise ValueError(f"{what} matches no file; write a pattern such as data/train-*.parquet")
    return _of_one_kind(found, kinds, what)


def within(folder: Path, kinds: Collection[str], what: str, split: str | None, key: str) -> list[Path]:
    """The files of prompts in a folder, or of a split of it, in the order of their names; arguments as of `matching`.

    Raises ValueError where there is none, for a split that is not there, and where there are several to choose from.
    """
    if (folder / "dataset_dict.json").is_file():
        there = read_json(folder / "dataset_dict.json", f"{what}: dataset_dict.json").get("splits")
        names = [str(name) for name in _list(there) if Path(str(name)).name == name]
        if not names:
            raise ValueError(f"{what} names no split in dataset_dict.json; save the dataset again")
        return _saved(folder / _chosen(names, split, what, key), what)
    if (folder / "state.json").is_file():
        _no_split(split, what, key)
        return _saved(folder, what)
    files = [path for path in sorted(folder.rglob("*")) if holds_data(path.relative_to(folder), kinds)]
    files = [path for path in files if path.is_file()]
    files = [path for path in files if kind_of(path) not in BESIDE_OTHERS] or files
    if not files:
        raise ValueError(f"{what} is a folder without a file of prompts; write one with {_listed(kinds)}, or a file")
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    if split is None and len(by_split) == 1:
        return _of_one_kind(files, kinds, what)
    if split is None and "" in by_split:
        other, named = by_split.pop("")[0], sorted(by_split)[-1]
        raise ValueError(f"{what} has files of the split {named} and others such as {other.name}; write "
                         f"{key}={named}, or a pattern for the others")  # fmt: skip
    return _of_one_kind(by_split[_chosen([name for name in by_split if name], split, what, key)], kinds, what)


def holds_data(path: Path, kinds: Collection[str]) -> bool:
    """Whether a file of a folder, by its name below it, is one of prompts."""
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return kind_of(path) in kinds and not hidden and not BESIDE.match(path.name)


def _split_of(path: Path) -> str:
    """The split that a word in the name of the file, or of a folder above it, stands for; "" without one."""
    for part in reversed(path.with_suffix("").parts):
        words = set(re.split(r"[^a-z]+", part.lower()))
        for split, spelled in SPLITS.items():
            if words & set(spelled):
                return split
    return ""


def _chosen(names: list[str], split: str | None, what: str, key: str) -> str:
    """The split to read. Raises ValueError for one that is not there, or where there are several to choose from."""
    listed = ", ".join(sorted(names)[:SHOWN])
    if split is None:
        if len(names) == 1:
            return names[0]
        raise ValueError(f"{what} has the splits {listed}; write {key}={sorted(names)[-1]}, or another of them")
    if split not in names:
        has = f"it has {listed}" if names else "it has none"
        raise ValueError(
            f"{what} has no split {shown(split)}: {has}; write {key}={sorted(names)[0] if names else 'null'}"
        )
    return split


def _saved(folder: Path, what: str) -> list[Path]:
    """The files of a dataset that `save_to_disk` wrote, in the order of its rows, as state.json has them."""
    if not (folder / "state.json").is_file():
        raise ValueError(f"{what} has no {folder.name}/state.json: it is not whole; save the dataset again")
    state = read_json(folder / "state.json", f"{what}: state.json")
    listed = state.get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in _list(listed)]
    if not isinstance(listed, list) or not all(isinstance(name, str) and _is_shard(name) for name in names):
        raise ValueError(f"{what}: state.json does not name its files under _data_files; save the dataset again")
    if state.get("_indices_data_files"):  # of an early version of `datasets`
        raise ValueError(f"{what} is a selection whose rows are listed apart; load it, and save its flatten_indices()")
    files = [folder / str(name) for name in names]
    if missing := next((path for path in files if not path.is_file()), None):
        raise ValueError(
            f"{what} misses {missing.name}, which state.json names; copy it too, or save the dataset again"
        )
    return files


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _is_shard(name: str) -> bool:
    return Path(name).name == name and name.endswith(".arrow")


def _of_one_kind(files: list[Path], kinds: Collection[str], what: str) -> list[Path]:
    found = sorted({kind_of(path) for path in files})
    if len(found) > 1:
        raise ValueError(f"{what} has files {' and '.join(found)}; write a pattern for those of one kind, such as "
                         f"{files[0].parent}/*{found[0]}")  # fmt: skip
    if found[0] not in kinds:
        raise ValueError(f"{what} matches files {found[0] or 'without an ending'}; write files {_listed(kinds)}")
    return files


def _no_split(split: str | None, what: str, key: str) -> None:
    if split is not None:
        raise ValueError(f"{key}={plain(split)}: {what} has no splits; write {key}=null")


def _listed(kinds: Collection[str]) -> str:
    """The kinds for a message; those of packed files where there are no others."""
    *most, last = [kind for kind in kinds if not kind.endswith(GZIP)] or kinds
    return f"{', '.join(most)} or {last}" if most else last
