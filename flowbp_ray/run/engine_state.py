"""The state of a training engine in files: safetensors and JSON, by parameter name, whatever ranks and engine wrote it.

    engine/rank_0000.safetensors    what rank 0 owns: `master/<parameter>`, `exp_avg/…`, `exp_avg_sq/…`, `average/…`
    engine/rank_0000.json           which flat indices of each parameter these are, its shape, how often it was updated

A tensor in a file is one piece of a flat parameter, elements start … start + length. The pieces of all ranks cover each
parameter once, so that a rank of another number reads the slices it needs, by memory map. No file holds code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowbp_ray.utils.diff import differing, shown
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.tensor_file import full_is_no_space, write_bytes, write_tensors

FORMAT = 1
ENGINE = "engine"
MASTER, AVERAGE, MOMENTS = "master", "average", ("exp_avg", "exp_avg_sq")
ADAPTER = re.compile(r"\.lora_[AB]\.")
"""In the names of parameters that are adapters (peft)."""
SCALES, CODES = ".scales", ".codes"
"""Of a moment in int8: one number per block of `BLOCK`, and the 256 values that its numbers from 0 to 255 stand for."""
BLOCK = 256


@dataclass(frozen=True)
class Fragment:
    """What a rank owns of one parameter: the elements from `start` on of the flat parameter.

    shape: of the whole parameter. tensors: 1-D by kind, fp32 and of one length, or uint8 with SCALES and CODES beside.
    updates: optimizer steps that the parameter has taken.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    updates: int
    tensors: Mapping[str, Tensor]


def write_state(
    folder: Path, fragments: Iterable[Fragment], rank: int, ranks: int, learners: Mapping[str, object]
) -> dict[str, str]:
    """Write what one rank owns below a checkpoint's folder; return the sha256 of the files by name.

    learners: `LearnersConfig.moves`, to say later what changed. Raises NoSpace where the disk is full.
    """
    with full_is_no_space(folder / ENGINE):
        (folder / ENGINE).mkdir(parents=True, exist_ok=True)
    parameters: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for fragment in fragments:
        parameters[fragment.name] = {
            "shape": list(fragment.shape),
            "start": fragment.start,
            "length": fragment.tensors[MASTER].numel(),
            "updates": fragment.updates,
        }
        tensors |= {f"{kind}/{fragment.name}": tensor for kind, tensor in fragment.tensors.items()}
    index = {"format": FORMAT, "rank": rank, "ranks": ranks, "learners": dict(learners), "parameters": parameters}
    name = f"{ENGINE}/rank_{rank:04d}"
    return {
        f"{name}.safetensors": write_tensors(folder / f"{name}.safetensors", tensors),
        f"{name}.json": write_bytes(folder / f"{name}.json", (json.dumps(index) + "\n").encode()),
    }


def copied(fragments: Iterable[Fragment]) -> list[Fragment]:
    """The same fragments in host memory of their own, which training on does not change."""
    return [
        replace(fragment, tensors={kind: tensor.detach().to("cpu", copy=True) for kind, tensor in held.items()})
        for fragment in fragments
        for held in [fragment.tensors]
    ]


def bytes_of(fragments: Iterable[Fragment]) -> int:
    """Bytes of all their tensors."""
    return sum(tensor.nbytes for fragment in fragments for tensor in fragment.tensors.values())


@dataclass(frozen=True)
class Piece:
    """Elements start … stop of a flat parameter, in a rank's file."""

    start: int
    stop: int
    file: Path
    updates: int


class EngineState:
    """The state that all ranks of a group wrote below a checkpoint's folder. Opening it reads the JSON files only."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where files are missing, of another format, or do not cover the parameters."""
        self.folder = folder / ENGINE
        indices = [read_index(path) for path in sorted(self.folder.glob("rank_*.json"))]
        ranks = indices[0]["ranks"] if indices else 0
        if not indices or sorted(index["rank"] for index in indices) != list(range(ranks)):
            raise ConfigError(f"{self.folder} has the files of {len(indices)} ranks of {ranks or 'an unknown number'}")
        self.learners: dict[str, object] = indices[0]["learners"]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, list[Piece]] = {}
        self.opened: dict[Path, tuple[Any, frozenset[str]]] = {}
        for index in indices:
            file = self.folder / f"rank_{index['rank']:04d}.safetensors"
            for name, own in index["parameters"].items():
                self.shapes[name] = tuple(own["shape"])
                stop = own["start"] + own["length"]
                self.pieces.setdefault(name, []).append(Piece(own["start"], stop, file, own["updates"]))
        for name, pieces in self.pieces.items():
            pieces.sort(key=lambda piece: (piece.start, piece.stop))
            _check_cover(self.folder, name, pieces, torch.Size(self.shapes[name]).numel())

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ConfigError unless the state is that of parameters of these names and shapes."""
        own = {name: tuple(shape) for name, shape in shapes.items()}
        if self.adapters and not any(map(ADAPTER.search, own)):
            raise ConfigError(f"{self.folder} is the state of adapters, of a run that trains all weights since; start "
                              "a new run with learners.lora, or give the newer checkpoint its name back")  # fmt: skip
        if own != self.shapes:
            apart = sorted(name for name in own.keys() | self.shapes.keys() if own.get(name) != self.shapes.get(name))
            raise ConfigError(f"{self.folder} is the state of other parameters, e.g. {', '.join(apart[:3])}")

    @property
    def adapters(self) -> bool:
        """Whether it is the state of adapters."""
        return any(map(ADAPTER.search, self.shapes))

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter's tensor in its shape, fp32, in memory of its own."""
        flat = torch.empty(torch.Size(self.shapes[name]).numel())
        self.fill(flat, kind, name)
        return flat.view(self.shapes[name])

    def updates(self, name: str) -> int:
        """How often the parameter was updated; 0 where it never had a gradient."""
        return max(piece.updates for piece in self.pieces[name])

    @cached_property
    def most_updates(self) -> int:
        """The largest number of updates of any parameter, for engines that count them once for many parameters."""
        return max((self.updates(name) for name in self.pieces), default=0)

    def fill(self, target: Tensor, kind: str, name: str, start: int = 0) -> None:
        """Copy elements start … start + len(target) of a flat parameter's tensor into `target` [n] fp32, in place.

        A moment that is kept in int8 becomes code[value] · scale; one of a parameter without update is 0.
        """
        stop = start + len(target)
        for piece in self.pieces[name]:
            a, b = max(start, piece.start), min(stop, piece.stop)
            if a < b:
                part = target[a - start : b - start]
                if kind in MOMENTS and not piece.updates:
                    part.zero_()
                else:
                    part.copy_(self._read(piece, kind, name, a - piece.start, b - piece.start))

    def stored(self, kind: str, name: str) -> Tensor:
        """The whole tensor as it is in the file, flat. Raises ConfigError where several ranks wrote it."""
        [piece, *others] = self.pieces[name]
        if others:
            raise ConfigError(f"{self.folder}: {kind}/{name} is in {1 + len(others)} pieces")
        found: Tensor = self._slice(piece, kind, name)[:]
        return found

    def quantised(self, kind: str, name: str) -> bool:
        """Whether a moment of the parameter is in int8."""
        piece = self.pieces[name][0]
        return bool(piece.updates) and self._slice(piece, kind, name).get_dtype() == "U8"

    def _file(self, piece: Piece) -> tuple[Any, frozenset[str]]:
        """The opened file of a piece, and the names of its tensors."""
        if piece.file not in self.opened:
            try:
                file = safe_open(piece.file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{piece.file} is no file of safetensors ({error})") from error
            self.opened[piece.file] = file, frozenset(file.keys())
        return self.opened[piece.file]

    def _slice(self, piece: Piece, kind: str, name: str) -> Any:
        file, keys = self._file(piece)
        if f"{kind}/{name}" not in keys:
            raise ConfigError(f"{piece.file} holds no {kind}/{name}; the run that wrote it kept none")
        return file.get_slice(f"{kind}/{name}")

    def _read(self, piece: Piece, kind: str, name: str, a: int, b: int) -> Tensor:
        found = self._slice(piece, kind, name)
        values: Tensor = found[a:b]
        if found.get_dtype() != "U8":
            return values
        first, last = a // BLOCK, -(-b // BLOCK)
        scales: Tensor = self._slice(piece, kind + SCALES, name)[first:last]
        codes: Tensor = self._slice(piece, kind + CODES, name)[:]
        return codes[values.long()] * scales[torch.arange(a, b) // BLOCK - first]


def read_index(path: Path) -> dict[str, Any]:
    """The JSON beside a rank's file. Raises ConfigError where it cannot be read or is of a later format."""
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        version = index["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
    if version != FORMAT:
        raise ConfigError(
            f"{path} has format {version}, this version reads {FORMAT}; go on with the version that wrote it"
        )
    return index


def moved(folder: Path, learners: Mapping[str, object]) -> list[str]:
    """What differs between the learners that wrote a checkpoint and these (`LearnersConfig.moves`): `key was a, is b`.

    Raises ConfigError as `read_index` does.
    """
    path = folder / ENGINE / "rank_0000.json"
    written = read_index(path)["learners"] if path.is_file() else learners
    return [f"learners.{key} was {shown(a)}, is {shown(b)}" for key, a, b in differing(written, learners)]


def _check_cover(folder: Path, name: str, pieces: Iterable[Piece], numel: int) -> None:
    end = 0
    for piece in pieces:
        if piece.start != end:
            break
        end = piece.stop
    if end != numel:
        raise ConfigError(f"{folder}: the pieces of {name} do not cover its {numel} elements once")
