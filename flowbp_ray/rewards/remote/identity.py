"""What a run and a reward server must agree on for remote scores to be the local ones, bit for bit.

That is everything the scores and the cotangents depend on: backbone, image size and decoder, the size of the global
batch, targets per sample (branches), and the `rewards` section without what says where and with how many processes.
Files are compared by content: paths differ between clusters.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.rewards import RewardConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.utils.addresses import existing_path
from flowbp_ray.utils.diff import differing, shown
from flowbp_ray.utils.digest import file_digest
from flowbp_ray.utils.files import cache_folder

ELSEWHERE = {
    *("terms", "monitors", "count", "threads", "cpus", "gpus"),
    *("micro_batch", "decoder", "url", "token_file"),
}


def identity(config: RunConfig) -> dict[str, Any]:
    """Plain values by name, for JSON. `decoder` is None where this machine has no decoder."""
    cache = cache_folder(config.encoder.cache)
    memory = None if cache is None else cache / "files"
    model, settings = config.backbone, config.rewards
    return {
        "backbone": {"name": model.name, "height": model.height, "width": model.width},
        "decoder": decoder(build_backbone(model).base_folder / "vae", memory),
        "batch": config.data.shape.batch,
        "branches": config.surrogate().branches,
        "terms": [term.name for term in settings.terms],
        "monitors": [monitor.name for monitor in settings.monitors],
        "rewards": {reward.name: _reward(reward, memory) for reward in settings.all},
        "settings": settings.model_dump(mode="json", exclude=ELSEWHERE),
    }


def digest(found: Mapping[str, Any]) -> str:
    """16 hex digits of an identity."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def decoder(folder: Path, memory: Path | None) -> str | None:
    """sha256 over the VAE's configuration and weights, or None where there are none.

    Keys with an underscore are left out: they name the path and the diffusers version that wrote the file. Variants
    (`*.fp16.safetensors`) are not loaded, nor looked at.
    """
    files = sorted(file for file in folder.glob("*.safetensors") if "." not in file.stem)
    if not files or not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    parts = [json.dumps(kept, sort_keys=True), *(f"{file.name} {content(file, memory)}" for file in files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def content(path: Path, memory: Path | None) -> str:
    """sha256 of a file, or of a folder's files with their names, behind links too; hidden ones are left out."""
    if path.is_file():
        return file_digest(path, memory)
    lines = [f"{file.relative_to(path).as_posix()} {file_digest(file, memory)}" for file in _inside(path)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _inside(folder: Path) -> Iterator[Path]:
    for here, folders, names in os.walk(folder, followlinks=True):
        real = Path(here).resolve()
        if Path(here) != folder and Path(here).parent.resolve().is_relative_to(real):  # a link to where it lies itself
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        yield from (file for name in names if not name.startswith(".") and (file := Path(here, name)).is_file())


def _reward(reward: RewardConfig, memory: Path | None) -> dict[str, Any]:
    """A reward's settings; an option that names a file or a folder stands for its content."""
    plain = reward.model_dump(mode="json", exclude={"name", "options"}) | {"kind": reward.factory}
    return plain | {"options": {name: _option(value, memory) for name, value in reward.options.items()}}


def _option(value: Any, memory: Path | None) -> Any:
    if isinstance(value, dict):
        return {key: _option(each, memory) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_option(each, memory) for each in value]
    path = existing_path(value) if isinstance(value, str) and value else None
    return value if path is None else f"sha256:{content(path, memory)}"


def different(run: Mapping[str, Any], server: Mapping[str, Any]) -> list[str]:
    """Where an identity of a run is not that of a server, as `key is a here and b there`.

    What the run cannot know is not compared: a decoder that is not on its machine, and options that it leaves out.
    """
    return [
        f"{key} is {shown(a)} here and {shown(b)} there"
        for key, a, b in differing(run, server)
        if a is not None or not (key == "decoder" or ".options." in key)
    ]
