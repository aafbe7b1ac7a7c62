"""README's table of what fits where, from the shipped runs whose names end in the GPUs that they are for.

`python -m benchmarks.fits` prints it: sd35_lora_24gb is for one GPU of 24 GB, flux1_8x80gb for eight of 80 GB.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.published import FAMILIES, RecordedCosts, model_folder
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning import cluster
from flowbp_ray.planning.advice import check_fit
from flowbp_ray.planning.cluster import Cluster, parse_gpus
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.forecast import forecast
from flowbp_ray.utils.units import format_bytes

CARDS = re.compile(r"_(?:(\d+)x)?(\d+)gb$")
BASES = {"nf4": "an NF4 base", "int8": "an int8 base"}
HEAD = ("config", "GPUs", "model", "trained", "images per step", "fullest GPU, by plan")


def cards_of(name: str) -> str | None:
    """The GPUs that the name of a run ends in, as `--gpus` takes them; None for another name."""
    found = CARDS.search(name)
    return f"{found[1] or 1}x{found[2]}GB" if found else None


def shipped() -> list[str]:
    """The shipped runs that are for certain GPUs, those for the smallest first."""
    names = [path.stem for path in (loading.shipped() / "runs").glob("*.yaml") if cards_of(path.stem)]
    return sorted(names, key=lambda name: (sum(parse_gpus(cards_of(name) or "")), name))


def row(config: RunConfig, costs: Costs) -> tuple[str, ...]:
    """A run's row. Raises ValueError where it does not fit on the GPUs of its name."""
    gpus = cards_of(config.name) or ""
    verdict = check_fit(config, Cluster(parse_gpus(gpus)), costs)
    if not verdict.fits:
        raise ValueError(f"{config.name} does not fit: {verdict.line}")
    fullest = max(card.nbytes for card in cluster.cards(forecast(config, costs)))
    lora, model = config.learners.lora, config.backbone
    base = f" over {BASES[model.quantization]}" if model.quantization else ""
    trained = "all weights" if lora is None else f"adapters of rank {lora.rank}{base}"
    name, images = FAMILIES[model.name].split("/")[-1], str(config.data.shape.batch)
    return config.name, gpus, f"{name}, {model.height}²", trained, images, format_bytes(fullest, "GiB")


def table(costs_of: Callable[[RunConfig], Costs] = RecordedCosts) -> str:
    """The table in Markdown. costs_of: gives the traces of a configuration."""
    lines = [HEAD, tuple("---" for _ in HEAD)]
    with tempfile.TemporaryDirectory() as folder:
        for name in shipped():
            family = name.split("_")[0]
            path = model_folder(family, Path(folder) / family)
            config = loading.load(name, [f"backbone.path={path}"])
            lines.append(row(config, costs_of(config)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    print(table())
