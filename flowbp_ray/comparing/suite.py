"""A suite: a YAML file that names rows (methods, settings), seeds and columns, and the run of each row and seed.

name: methods
config: shapes_base            # a row's own config comes in its place
overrides: [steps=60, evaluation.every=20]
seeds: [1, 2, 3, 4, 5]
rows:
  ReFL: {config: shapes_refl}
  FlowBP-Sparse: {config: shapes_flowbp_sparse}
  FlowBP-Sparse, K = 2: {config: shapes_flowbp_sparse, overrides: [method.k=2]}
columns: [verifier, quality, shapes_clip_heldout]
reference: FlowBP-Sparse       # a second table: the others minus this row, seed by seed
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field, ValidationError, field_validator, model_validator

from flowbp_ray.config import loading, yaml_text
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.run.folder import Run, comparable, differences
from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.diff import shown
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.settings import Strict
from flowbp_ray.utils.text_files import read_text

BASE = "base"
"""The row of what all runs began with."""


class Row(Strict):
    """A row of the table: a configuration and what it changes."""

    config: str | None = None
    """A YAML file or a shipped name. null: the suite's."""
    overrides: list[str] = Field([])
    """`key=value`, after those of the suite."""


class Suite(Strict):
    """Rows, seeds and columns."""

    name: str = Field(pattern=r"^[\w.+-]*\w[\w.+-]*$")
    """Of the suite, and of its folder."""
    runs: str | None = Field(None, pattern=r"^[\w.+-]*\w[\w.+-]*$")
    """The folder of the runs, beside the suite's own. Suites that name the same one share the runs of rows that they
    have in common. null: the suite's."""
    config: str | None = None
    """Of rows that name none."""
    overrides: list[str] = Field([])
    """`key=value`, for every run."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    """`seed` and `plan_seed` of the runs of each row."""
    rows: dict[str, Row] = Field(min_length=1)
    """By the name that the table gives them."""
    columns: list[str] = Field([])
    """Metrics of the evaluation, in order. Empty: all that are over all prompts."""
    lower: list[str] = Field([])
    """Metrics of which less is better."""
    reference: str | None = None
    """A row, or `base`: a second table has the difference of every other row from it, seed by seed."""
    guidance: float | None = Field(None, ge=1)
    """Guidance of the evaluation that is shown. null: the first of `evaluation.guidance`."""
    figures: dict[str, str] = Field({})
    """By caption: further pictures for the page, PNG files such as those of `python -m benchmarks.gradient`."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError("a seed is there twice, and a run again is no second observation; write it once")
        return value

    @field_validator("figures")
    @classmethod
    def _readable(cls, value: dict[str, str]) -> dict[str, str]:
        for caption, file in value.items():
            try:
                with Image.open(expand(file)) as image:
                    image.verify()
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{caption!r}: {file} cannot be read as a picture; write the path of a PNG") from error
        return value

    @field_validator("rows")
    @classmethod
    def _beside_base(cls, value: dict[str, Row]) -> dict[str, Row]:
        if BASE in value:
            raise ValueError(f"{BASE} is the row of what the runs began with; write another name")
        return value

    @model_validator(mode="after")
    def _reference_is_a_row(self) -> Suite:
        if self.reference not in (None, BASE, *self.rows):
            raise ValueError(f"reference: there is no row {self.reference!r}; write one of {', '.join(self.rows)}")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a suite."""

    row: str
    seed: int
    config: str
    overrides: tuple[str, ...]
    folder: Path

    def command(self) -> list[str]:
        """The arguments of `flowbp-ray` that train it, from its last checkpoint where it has one."""
        return ["train", self.config, *self.overrides]

    def load(self) -> RunConfig:
        """Its configuration. Raises ConfigError with the row's name."""
        try:
            return loading.load(self.config, self.overrides)
        except ConfigError as error:
            raise ConfigError(f"row {self.row!r}: {error}") from error


def read(file: str) -> Suite:
    """Read a suite. Raises ConfigError, one line, with the file's name, for what is wrong with it."""
    path = Path(expand(file))
    if not path.is_file():
        raise ConfigError(f"no suite {file}; write the path of a YAML file with name, seeds and rows")
    try:
        plain: Any = yaml_text.parse(read_text(path, str(path))) or {}
        return Suite.model_validate(plain)
    except ValidationError as error:
        found = [(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors(include_url=False)]
        problems = [f"{key or 'the file'}: {message.removeprefix('Value error, ')}" for key, message in found]
        raise ConfigError(f"{file}: {'; '.join(problems[:5])}; write name, seeds, rows, config") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not a suite: {error}; write name, seeds and rows") from error


def cells(suite: Suite, out: Path) -> list[Cell]:
    """The runs, seed by seed, so that a suite that was stopped has some seeds of every row.

    Raises ConfigError for a row without a configuration, two rows with one name, rows that cannot be compared, or the
    folder of a run with another configuration: the suite has changed since.
    """
    slugs = {name: re.sub(r"[^\w.-]+", "_", name).strip("_") or "row" for name in suite.rows}
    if len(set(slugs.values())) < len(slugs):
        raise ConfigError(f"two rows have the same name for a folder: {sorted(slugs.values())}; rename one")
    found = []
    for seed in suite.seeds:
        for name, row in suite.rows.items():
            config = row.config or suite.config
            if config is None:
                raise ConfigError(f"row {name!r} has no config, nor has the suite; write config: in one of them")
            run = f"{slugs[name]}_seed{seed}"
            where = [f"name={loading.quoted(run)}", f"output={loading.quoted(str(out))}"]
            own = [f"seed={seed}", f"plan_seed={seed}", *where, "resume=auto"]
            overrides = (f"evaluation.base_cache={loading.quoted(str(out / BASE))}", *suite.overrides, *row.overrides)
            found.append(Cell(name, seed, config, (*overrides, *own), out / run))
    _check_rows(suite, found[: len(suite.rows)])
    for cell in found:
        _check_folder(suite, cell)
    return found


def _check_folder(suite: Suite, cell: Cell) -> None:
    """Raises ConfigError where the folder holds a run of another configuration than the suite says now."""
    if not (cell.folder / "config.yaml").is_file():
        return
    if lines := differences(comparable(Run.open(cell.folder).config), comparable(cell.load())):
        what = f"{cell.folder} is a run of another configuration ({lines[0]}), so"
        if suite.runs is not None:
            raise ConfigError(f"{what} it is not that of row {cell.row!r}; write another runs:, or rename the row")
        raise ConfigError(f"{what} the suite has changed since; write another name: for it, or remove that folder")


def _check_rows(suite: Suite, rows: Sequence[Cell]) -> None:
    """Raises ConfigError unless all rows evaluate one model on the same prompts and noise, at the guidance shown."""
    first: dict[str, Any] = {}
    for cell in rows:
        config = cell.load()
        model, evaluation = config.backbone, config.evaluation
        if not evaluation.prompts:
            raise ConfigError(f"row {cell.row!r}: evaluation.prompts is null, so there is nothing to compare; write it")
        measured = [*evaluation.guidance, *evaluation.guidance_ends]
        scale = suite.guidance if suite.guidance is not None else next(iter(measured), None)
        if scale not in measured:
            raise ConfigError(f"row {cell.row!r}: nothing is evaluated at guidance {scale}; write it in "
                              "evaluation.guidance")  # fmt: skip
        own = {f"backbone.{key}": getattr(model, key) for key in ("name", "path", "height", "width")}
        own |= {f"evaluation.{key}": getattr(evaluation, key) for key in ("prompts", "limit", "seed")}
        own |= {"guidance": scale}
        for key, value in own.items():
            if first.setdefault(key, value) != value:
                raise ConfigError(
                    f"row {cell.row!r}: {key} is {shown(value)}, in {rows[0].row!r} {shown(first[key])}; rows are "
                    "compared on one model, and on the same prompts and noise: write the same"
                )
