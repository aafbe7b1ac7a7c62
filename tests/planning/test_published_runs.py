"""The published runs and those for certain GPUs fit where they say, by traces of the models at true size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import fits
from benchmarks.published import FAMILIES, PUBLISHED, RecordedCosts, model_folder
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning import cluster
from flowbp_ray.planning.advice import check_fit
from flowbp_ray.planning.cluster import Cluster, parse_gpus
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.forecast import forecast
from flowbp_ray.utils.units import GIB
from tests.paths import ROOT


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> a folder with the published configurations."""
    return {family: model_folder(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def load(name: str, models: dict[str, Path], *more: str) -> RunConfig:
    return loading.load(name, [f"backbone.path={models[name.split('_')[0]]}", *more])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_run_fits_on_8_gpus_of_80_gb(name: str, models: dict[str, Path]) -> None:
    """All of them are used. A reward server holds HPSv2.1 too: 986 M parameters, 3.7 GiB in fp32."""
    config = load(name, models)
    costs = RecordedCosts(config)
    verdict = check_fit(config, Cluster(parse_gpus("8x80GB")), costs)
    assert verdict.fits and verdict.line.startswith("fits: 8 of 8 GPUs"), verdict.line
    scoring = forecast(config, costs).roles[2]
    held = {share.name: share.nbytes for share in scoring.shares}
    assert held["hpsv2 weights"] == pytest.approx(3.7 * GIB, rel=0.02)
    assert config.encoder.gpus <= 1  # which is done before the others are placed


@pytest.mark.parametrize("name", fits.shipped())
def test_a_run_for_certain_gpus_fits_on_them(name: str, models: dict[str, Path]) -> None:
    config = load(name, models)
    gpus = fits.cards_of(name)
    assert gpus is not None and config.name == name
    costs = RecordedCosts(config)
    assert check_fit(config, Cluster(parse_gpus(gpus)), costs).fits
    assert cluster.count_gpus(forecast(config, costs)) == len(parse_gpus(gpus))


def test_readme_has_the_table_of_the_command() -> None:
    found = re.search(r"<!-- fits -->\n(.*)\n<!-- /fits -->", (ROOT / "README.md").read_text(), re.DOTALL)
    printed = fits.table()
    assert printed.count("\n") == len(fits.shipped()) + 1
    assert found is None or found[1].strip() == printed


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_traces_are_those_of_today(models: dict[str, Path]) -> None:
    config = load("sd35_refl", models)
    kept, made = RecordedCosts(config), Costs(config)
    assert kept.node(config) == made.node(config) and kept.decoding(1, True) == made.decoding(1, True)
    assert kept.rollout(config, 8, 3.5) == made.rollout(config, 8, 3.5)
