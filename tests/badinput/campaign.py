"""All cases in this process, without Ray: counts by kind, and every input that went wrong."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from flowbp_ray.config.yaml_text import parse
from tests.badinput.configs import base, keys, mutated, says, with_value, words
from tests.badinput.data_cases import data_cases
from tests.badinput.outcome import Case, Outcome, outcome
from tests.badinput.prompt_cases import prompt_cases
from tests.badinput.reward_cases import reward_cases
from tests.badinput.saved_cases import saved_cases
from tests.badinput.weight_cases import weight_cases

MUTATED, DRAWN = 500, 300  # YAML files, and values that hypothesis draws

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["", " ", "a #b", "a: b", "~", "null", "1e-3", "2025-01-01", "${seed}", "auto", "x" * 5000, "\u2028"]
    ),
    st.dates(),
    st.binary(max_size=4),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@contextmanager
def elsewhere(folder: Path) -> Iterator[None]:
    """Work in a folder of its own: a mutated path may be relative."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def drawn(folder: Path, count: int, number: int = 17) -> list[Outcome]:
    """`count` values that hypothesis draws, each under a key of the schema, written to a file and read."""
    plain: dict[str, Any] = parse(base(folder))
    found: list[Outcome] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(keys(plain)), values)
    def draw(key: str, value: Any) -> None:
        file = folder / "drawn.yaml"
        text = yaml.safe_dump(with_value(plain, key, value), sort_keys=False, allow_unicode=False)
        file.write_text(text)
        case = Case(
            "value of the schema", f"{key}={value!r:.60}", file, names=[file.name, *words()], right=says(text.encode())
        )
        found.append(outcome(case))

    draw()
    return found


def campaign(folder: Path, mutations: int = MUTATED, draws: int = DRAWN, every: int = 1) -> tuple[list[Outcome], float]:
    """All outcomes and the seconds that they took. every: of files and folders, take one of so many."""
    began = time.perf_counter()
    makers: dict[str, Callable[[Path], Iterable[Case]]] = {
        "configs": lambda place: mutated(place, mutations),
        "prompts": lambda place: islice(prompt_cases(place), 0, None, every),
        "data": lambda place: islice(data_cases(place), 0, None, every),
        "saved": lambda place: islice(saved_cases(place), 0, None, every),
        "weights": lambda place: islice(weight_cases(place), 0, None, every),
        "rewards": lambda place: reward_cases(place, every=every),
    }
    found: list[Outcome] = []
    with elsewhere(folder):
        for name, make in makers.items():
            (folder / name).mkdir()
            found += [outcome(case) for case in make(folder / name)]
        (folder / "drawn").mkdir()
        found += drawn(folder / "drawn", draws)
    return found, time.perf_counter() - began


def in_a_new_folder(**options: Any) -> tuple[list[Outcome], float]:
    with tempfile.TemporaryDirectory() as folder:
        return campaign(Path(folder), **options)
