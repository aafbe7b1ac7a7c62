"""Traces of the published models at true size, kept in tests/data/traces.json because making them takes minutes.

`python -m benchmarks.published` makes those that the shipped runs need and that are not there yet; with `--anew` all,
as after a change of what is traced. A test marked long makes some of them again and compares.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.forecast import forecast
from flowbp_ray.planning.memory import Sizes
from flowbp_ray.planning.trace import Cost
from flowbp_ray.surrogate import METHODS

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
FILE = DATA / "traces.json"
FAMILIES = {
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "flux1": "black-forest-labs/FLUX.1-dev",
    "flux2": "black-forest-labs/FLUX.2-klein-base-9B",
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""Of SD3.5 and FLUX.1, whose scaling differs and does not matter here."""
FLUX2_VAE = {"_class_name": "AutoencoderKLFlux2", "block_out_channels": [128, 256, 512, 512]}
"""The rest is the class's default."""
PUBLISHED = [f"{family}_{method}" for family in FAMILIES for method in METHODS]


def model_folder(family: str, folder: Path) -> Path:
    """The configurations of a published model, below `folder`, without a weight."""
    entry = json.loads((DATA / "model_configs.json").read_text())[FAMILIES[family]]
    vae = FLUX2_VAE if family == "flux2" else VAE
    for part, config in (("transformer", entry["config"] | {"_class_name": entry["class"]}), ("vae", vae)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    return folder


UNKEPT = ("prompts", "reward", "linears")
"""First words of keys for which `Costs` finds the values soon."""
REWARDS: dict[tuple[Any, ...], Any] = {}
"""Rewards' models without weights, which are the same for all runs."""


class RecordedCosts(Costs):
    """The traces of a published model from the file; one that is missing fails, or is made with `record`."""

    def __init__(self, config: RunConfig, record: bool = False) -> None:
        super().__init__(config)
        self.name, self.record = config.backbone.name, record
        self.kept: dict[str, Any] = json.loads(FILE.read_text()) if FILE.is_file() else {}

    def once(self, key: tuple[Any, ...], find: Callable[[], Any]) -> Any:
        """As in `Costs`; what is no number of a trace is not kept in the file, rewards' models in this process."""
        if key[0] == "reward" and key not in REWARDS:
            REWARDS[key] = find()
        if key[0] in UNKEPT or key in self.known:
            return super().once(key, lambda: REWARDS[key] if key in REWARDS else find())
        name = f"{self.name} {key!r}"
        if name not in self.kept:
            assert self.record, f"{FILE.name} has no {name}; run python -m benchmarks.published"
            print(name, flush=True)
            found = find()
            self.kept[name] = asdict(found) if is_dataclass(found) else found
            FILE.write_text(json.dumps(dict(sorted(self.kept.items())), indent=1) + "\n")
        kept = self.kept[name]
        if isinstance(kept, dict):
            kept = Sizes(**kept) if key[0] == "sizes" else Cost(**kept)
        return super().once(key, lambda: kept)


def main(anew: bool) -> None:
    """Make the traces of all runs of the published families that are shipped."""
    if anew:
        FILE.unlink(missing_ok=True)
    shipped = sorted(path.stem for path in (loading.shipped() / "runs").glob("*.yaml"))
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            model_folder(family, Path(folder))
            for name in shipped:
                if name.startswith(f"{family}_"):
                    config = loading.load(name, [f"backbone.path={folder}"])
                    forecast(config, RecordedCosts(config, record=True))


if __name__ == "__main__":
    main("--anew" in sys.argv)
