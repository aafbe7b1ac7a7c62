"""python -m benchmarks.make_profile: write a profile for `flowbp-ray bench --emulate`, from floating-point operations.

Without arguments the shipped ones, into configs/profiles. Of a run of your own:
    python -m benchmarks.make_profile my.yaml backbone.path=models/sd35 --out my_h100.json
Nothing is measured: seconds are what `flowbp-ray plan` counts over peak x utilisation of the card, and bytes over a
bandwidth. The rewards' own models, evaluations and the sharding's communication are not counted, as in `plan`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.sizes import SIZES
from flowbp_ray.benching.profile import Profile, cost_settings, shipped
from flowbp_ray.config import loading
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning.costs import Costs
from flowbp_ray.planning.forecast import forecast

PEAK = 989e12  # FLOP/s of an H100 SXM, bf16 dense, by NVIDIA's data sheet
PUBLISH, LOAD = 25e9, 25e9  # bytes/s from and to the card: half of PCIe 5.0 x16's 63 GB/s, rounded down
SHIPPED = {"sd35_m_h100": ("sd35_flowbp_sparse", "sd35-medium"), "flux1_dev_h100": ("flux1_flowbp_sparse", "flux1-dev")}
CONFIGURATIONS = ("scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json")


def profile_of(config: RunConfig, title: str, peak: float, utilisation: float) -> Profile:
    """What `plan` counts for an image, in seconds of a card."""
    costs = Costs(config)
    plan, batch, rate = forecast(config, costs), config.data.shape.batch, peak * utilisation
    samplers, learners, rewards = (work.time / batch / rate for work in plan.work)
    tflop = ", ".join(f"{w.role} {w.flops / batch / 1e12:.4g}" for w in plan.work)
    return Profile(
        title=title,
        source=(
            f"computed, not measured: TFLOP per image ({tflop}) from flowbp-ray plan, at {utilisation:.0%} of "
            f"{peak / 1e12:.0f} TFLOP/s, fp32 decoding at half of that; weights at {PUBLISH / 1e9:.0f} GB/s from the "
            f"card and {LOAD / 1e9:.0f} GB/s to it. Not counted: the rewards' own models, ZeRO's communication"
        ),
        made_for=cost_settings(config),
        sampler_s=samplers,
        reward_s=rewards / config.surrogate().branches,
        learner_s=learners,
        publish_s_per_byte=1 / PUBLISH,
        load_s_per_byte=1 / LOAD,
        update_bytes=plan.traffic.per_update,
        prompt_bytes=plan.traffic.per_prompt,
        latent=costs.latent_shape,
        itemsize=config.backbone.torch_dtype.itemsize,
        model=_files(Path(config.backbone.path)) if config.backbone.path else {},
    )


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: json.loads((folder / name).read_text()) for name in CONFIGURATIONS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a run's YAML; without one the shipped profiles are written")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, help="the file, or the folder of the shipped ones", default=None)
    parser.add_argument("--tflops", type=float, default=PEAK / 1e12, help="of the card, bf16 dense")
    parser.add_argument("--utilisation", type=float, default=0.4)
    options = parser.parse_args()
    peak = options.tflops * 1e12
    if options.config:
        out = options.out or Path("profile.json")
        config = loading.load(options.config, options.overrides)
        write(profile_of(config, out.stem, peak, options.utilisation), out)
        return
    for title, (config_name, size) in SHIPPED.items():
        with tempfile.TemporaryDirectory() as folder:
            for name, content in SIZES[size].files().items():
                file = Path(folder) / name
                file.parent.mkdir()
                file.write_text(json.dumps(content))
            config = loading.load(config_name, [f"backbone.path={folder}"])
            made = profile_of(config, title, peak, options.utilisation)
        write(made, (options.out or shipped()) / f"{title}.json")


def write(profile: Profile, file: Path) -> None:
    file.write_text(json.dumps(profile.model_dump(mode="json"), indent=1) + "\n")
    print(f"{file}: {profile.sampler_s:.4g} s an image of a sampler, {profile.learner_s:.4g} of a learner")


if __name__ == "__main__":
    main()
