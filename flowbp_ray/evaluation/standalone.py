"""An evaluation outside training: of a checkpoint or of the model that a configuration names, part by part, resumable.

settings.json            what decides the values; a folder with others is refused
parts/000012.npz         the values of one item, and the pictures that are kept
results.parquet, results.json, pictures_guidance_3.png at the end
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flowbp_ray.config import loading
from flowbp_ray.config.data import HELD_OUT
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.evaluation.estimates import measure
from flowbp_ray.evaluation.results import SETTINGS, Results, prompts_of
from flowbp_ray.messages import Evaluated, Item, Version
from flowbp_ray.prompt_files import PromptRecord
from flowbp_ray.prompts import Needs
from flowbp_ray.run.folder import Run, comparable, prompts_digest
from flowbp_ray.run.pictures import save_grid
from flowbp_ray.run.snapshot import read_arrays
from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.diff import differing, shown
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.files import write_atomically
from flowbp_ray.utils.text_files import read_json

Weights = Literal["average", "raw", "base"]
READ = ("columns", "split", "where")
"""The keys of `evaluation`, and of `data`, that say how a file of prompts is read."""


def scales(text: str) -> tuple[float, ...]:
    """The guidance scales in `1,3.5`; none in an empty text. Raises ValueError for what is no number."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise ValueError(f"--guidance must be numbers such as 1,3.5, got {shown(text)}") from error


@dataclass(frozen=True)
class Request:
    """What to evaluate. target: a run's folder, a YAML file or a shipped name, of which the model is taken as it is.

    weights: of a run: the average where one is kept, the weights themselves, or the model that it began with. step:
    None is the newest checkpoint. pictures: per prompt, each from its own noise. overrides: `key=value`.
    judges: ask the configuration's judges too, whatever their role is in training.
    """

    target: str
    prompts: str | None = None
    guidance: tuple[float, ...] = ()
    pictures: int = 1
    weights: Weights = "average"
    step: int | None = None
    overrides: tuple[str, ...] = ()
    judges: bool = False

    def run(self) -> Run | None:
        """The run that `target` is the folder of, if it is one."""
        folder = Path(expand(self.target))
        return Run.open(folder) if folder.is_dir() else None

    def config(self) -> RunConfig:
        """The target's configuration with the overrides: its evaluation of the asked prompts, and no training.

        Raises ConfigError for a wrong one, ValueError where nothing is to draw, or a checkpoint is asked of no run.
        """
        run = self.run()
        if self.step is not None and (run is None or self.weights == "base"):
            raise ValueError("--step is of a run's trained weights; leave it out, or write the folder of a run and "
                             "--weights average or raw")  # fmt: skip
        if run is None and self.weights == "raw":
            raise ValueError(f"--weights raw: {self.target} is no folder of a run; write one, or --weights base")
        source: str | Path = self.target if run is None else run.folder / "config.yaml"
        over = list(self.overrides)
        if self.prompts:
            over.append(f"evaluation.prompts={loading.quoted(self.prompts)}")
            of_its_file = [f"evaluation.{key}=null" for key in ("limit", *READ)]
            over = [*of_its_file, *over]
        if self.guidance:
            over.append(f"evaluation.guidance={list(self.guidance)}")
        config = loading.load(source, over)
        if not config.evaluation.prompts:
            raise ValueError("evaluation.prompts is null, so there is nothing to draw; write --prompts FILE")
        if not config.evaluation.guidance:
            raise ValueError("evaluation.guidance is empty, so there is nothing to draw; write --guidance 1")
        if self.judges and not config.judges:
            raise ValueError("--judges: the configuration names none; write judges=[...], as docs/judges.md has it")
        learners = config.learners.model_copy(update={"base_penalty": None})
        cluster = config.cluster.model_copy(update={"share_base": False, "transport": "object_store"})
        drift = config.drift.model_copy(update={"max": None, "meter": False})
        data = config.data
        if config.evaluation.prompts != HELD_OUT:  # the run's own may be elsewhere
            read = {key: getattr(config.evaluation, key) for key in ("prompts", *READ)}
            data = data.model_copy(update=read | {"weights": None, "heldout": None})
        alone: dict[str, Any] = {"learners": learners, "cluster": cluster, "drift": drift, "data": data, "guard": None}
        alone["judges"] = config.judges if self.judges else []
        return config.model_copy(update=alone | {"staleness": 0, "steps": 1, "resume": "never"})


@dataclass(frozen=True)
class PartNeeds(Needs):
    """The prompts of each item, which stands in the place of a step."""

    parts: tuple[tuple[int, ...], ...] = ()

    def between(self, first: int, last: int | None = None) -> list[int]:
        return list(dict.fromkeys(i for part in self.parts[first:last] for i in part))

    def last_steps(self) -> dict[int, int]:
        return {i: place for place, part in enumerate(self.parts) for i in part}


class Standalone:
    """The items of an evaluation and the folder that holds what came of them."""

    def __init__(
        self,
        config: RunConfig,
        records: Sequence[PromptRecord],
        pictures: int,
        version: Version,
        folder: Path,
        of: Mapping[str, Any],
    ) -> None:
        """of: names the weights, for settings.json. Raises ValueError where the folder holds another evaluation."""
        self.config, self.records, self.pictures, self.folder = config, records, pictures, folder
        self.guidance = tuple(dict.fromkeys(config.evaluation.guidance))
        self.items = list(self._items(version))
        self.settings = self._settings(of)
        self.kept = self._kept()
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        file = folder / SETTINGS
        if file.is_file():
            if different := list(differing(read_json(file, str(file)), self.settings)):
                lines = "".join(f"\n  {key} was {shown(a)}, is {shown(b)}" for key, a, b in different)
                raise ValueError(
                    f"{folder} holds another evaluation; write another --out, or the same settings:{lines}"
                )
        else:
            write_atomically(file, lambda path: path.write_text(json.dumps(self.settings, indent=1) + "\n"))
        self.damaged = [part for part in map(self._part, self.items) if part.is_file() and _read(part) is None]
        """Parts that cannot be read, as after a power cut; they are removed, and drawn again."""
        for part in self.damaged:
            part.unlink()

    def _items(self, version: Version) -> Iterator[Item]:
        """Items of `evaluation.batch` pictures; `step` and `index` are an item's place, and no part of its noise."""
        settings, count = self.config.evaluation, len(self.records)
        rows, place = range(count * self.pictures), 0
        steps = settings.num_steps or self.config.backbone.num_steps
        for guidance in self.guidance:
            for start in range(0, len(rows), settings.batch):
                part = rows[start : start + settings.batch]
                ids = tuple(row % count for row in part)
                seed = settings.seed
                yield Item("evaluation", place, place, ids, tuple(part), (), seed, steps, guidance, version)
                place += 1

    def _settings(self, of: Mapping[str, Any]) -> dict[str, Any]:
        model, scored = self.config.backbone, comparable(self.config)["rewards"]
        digest = hashlib.sha256(json.dumps([r.extra for r in self.records], sort_keys=True, default=str).encode())
        return {
            **of,
            "prompts": len(self.records),
            "prompts_digest": prompts_digest([r.text for r in self.records]),
            "claims_digest": digest.hexdigest(),
            "pictures": self.pictures,
            "guidance": list(self.guidance),
            "seed": self.config.evaluation.seed,
            "batch": self.config.evaluation.batch,
            "num_steps": self.config.evaluation.num_steps or model.num_steps,
            "size": [model.height, model.width],
            "backbone": model.model_dump(mode="json"),
            "rewards": {key: scored[key] for key in ("terms", "monitors", "decoder", "precision")},
        } | ({"judges": comparable(self.config)["judges"]} if self.config.judges else {})

    def _kept(self) -> set[int]:
        """The rows whose pictures are kept for the sheet: the first of prompts from all over the file."""
        count = min(self.config.evaluation.pictures, len(self.records))
        return {i * len(self.records) // count for i in range(count)}

    @property
    def needs(self) -> PartNeeds:
        """The prompts of the items that are still missing, in order."""
        parts = tuple(item.prompt_ids for item in self.missing())
        return PartNeeds(self.config, 0, len(self.records), parts=parts)

    def missing(self) -> list[Item]:
        """The items without a part."""
        return [item for item in self.items if not self._part(item).is_file()]

    def _part(self, item: Item) -> Path:
        return self.folder / "parts" / f"{item.index:06d}.npz"

    def add(self, item: Item, result: Evaluated, scores: Mapping[str, np.ndarray] | None = None) -> None:
        """Measure an item's pictures, and write its part. scores: those of judges [rows], by metric."""
        records = [self.records[i] for i in item.prompt_ids]
        measured = measure(result.images, records, result.scores, np.array(result.drawn))
        rows = [n for n, sample in enumerate(item.samples) if sample in self.kept]
        arrays = {f"value|{name}": values for name, values in {**measured.values, **(scores or {})}.items()}
        arrays |= {"kept": np.array([item.samples[n] for n in rows], int), "images": result.images[rows]}

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

        write_atomically(self._part(item), write)

    def finish(self) -> Results:
        """Join the parts, write results and sheets of pictures. All parts must be there."""
        count = len(self.records)
        values: dict[float, dict[str, np.ndarray]] = {g: {} for g in self.guidance}
        pictures: dict[float, dict[int, np.ndarray]] = {g: {} for g in self.guidance}
        for item in self.items:
            part = _read(self._part(item))
            if part is None:
                raise ValueError(f"{self._part(item)} cannot be read; the same command draws its pictures again")
            for name in (key for key in part if key.startswith("value|")):
                flat = values[item.guidance].setdefault(name[6:], np.full(count * self.pictures, np.nan))
                flat[list(item.samples)] = part[name]
            pictures[item.guidance] |= dict(zip(part["kept"].tolist(), part["images"], strict=True))
        shaped = {
            g: {name: flat.reshape(self.pictures, count).T for name, flat in metrics.items()}
            for g, metrics in values.items()
        }
        results = Results(self.settings, prompts_of(self.records), shaped)
        results.write(self.folder)
        for guidance, shown_rows in pictures.items():
            order = sorted(shown_rows)
            captions = [self.records[row].text for row in order]
            save_grid([shown_rows[row] for row in order], captions, self.sheet(guidance))
        return results

    def sheet(self, guidance: float) -> Path:
        """The sheet of pictures at a guidance."""
        return self.folder / f"pictures_guidance_{guidance:g}.png"


def _read(part: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a part; None where it is none."""
    try:
        found = read_arrays(part)
    except ConfigError:
        return None
    return found if {"kept", "images"} <= found.keys() else None
