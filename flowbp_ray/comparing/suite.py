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
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from flowbp_ray.config import loading, yaml_text
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.settings import Strict
from flowbp_ray.utils.text_files import read_text


class Row(Strict):
    """A row of the table: a configuration and what it changes."""

    config: str | None = None
    """A YAML file or a shipped name. null: the suite's."""
    overrides: list[str] = Field([])
    """`key=value`, after those of the suite."""


class Suite(Strict):
    """Rows, seeds and columns."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Of the suite, and of its folder."""
    config: str | None = None
    """Of rows that name none."""
    overrides: list[str] = Field([])
    """`key=value`, for every run."""
    seeds: list[int] = Field(min_length=1)
    """`seed` and `plan_seed` of the runs of each row."""
    rows: dict[str, Row] = Field(min_length=1)
    """By the name that the table gives them."""
    columns: list[str] = Field([])
    """Metrics of the evaluation, in order. Empty: all that are over all prompts."""
    lower: list[str] = Field([])
    """Metrics of which less is better."""
    guidance: float | None = Field(None, ge=1)
    """Guidance of the evaluation that is shown. null: the first of `evaluation.guidance`."""


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
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise ConfigError(f"{file}: {'; '.join(problems[:5])}; write name, seeds, rows, config") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not a suite: {error}; write name, seeds and rows") from error


def cells(suite: Suite, out: Path) -> list[Cell]:
    """The runs, seed by seed, so that a suite that was stopped has some seeds of every row.

    Raises ConfigError for a row without a configuration, two rows with one name, or a run that evaluates nothing.
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
            own = [f"seed={seed}", f"plan_seed={seed}", f"name={run}", f"output={out}", "resume=auto"]
            found.append(Cell(name, seed, config, (*suite.overrides, *row.overrides, *own), out / run))
    for cell in found[: len(suite.rows)]:
        if not cell.load().evaluation.prompts:
            raise ConfigError(f"row {cell.row!r}: evaluation.prompts is null, so there is nothing to compare; write it")
    return found
