"""`flowbp-ray init`: a configuration to begin with, with a comment at each key that is the user's to give."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbp_ray.backbones.pipeline import PipelineBackbone
from flowbp_ray.backbones.registry import BACKBONES
from flowbp_ray.config import loading
from flowbp_ray.config.yaml_text import dump
from flowbp_ray.surrogate.methods import METHODS
from flowbp_ray.utils.errors import ConfigError, nearest

CARDS = {
    ("sd35", 24): "sd35_lora_24gb",
    ("flux1", 24): "flux1_lora_24gb",
    ("flux1", 48): "flux1_lora_48gb",
    ("flux2", 48): "flux2_lora_48gb",
}
"""(family, GB of one card) -> the shipped configuration that `plan` says fits there."""
FILES: Mapping[str, tuple[dict[str, str], float]] = {
    "hpsv2": ({"path": "HPS_v2.1_compressed.pt"}, 0.55),
    "pickscore": ({"path": "PickScore_v1"}, 1.0),
    "clipscore": ({"path": "clip-vit-large-patch14"}, 1.0),
    "aesthetic": ({"path": "sac+logos+ava1-l14-linearMSE.pth", "clip": "clip-vit-large-patch14"}, 10.0),
    "image_reward": ({"path": "ImageReward.pt", "tokenizer": "bert-base-uncased"}, 2.0),
}
"""Reward -> its files, to be replaced by where they lie, and its clip as published runs or its scale have it."""


@dataclass(frozen=True)
class Wish:
    """What is asked for. model: a folder of diffusers, or "shapes" for the embedded one. gb: of one card; 0: a cluster
    of eight cards of 80 GB, and all weights are trained."""

    name: str
    model: str
    method: str
    reward: str
    prompts: str
    gb: int


def family_of(model: str) -> str:
    """The family of a diffusers folder by its model_index.json. Raises ConfigError where it is none that is known."""
    if model == "shapes":
        return model
    index = Path(model).expanduser() / "model_index.json"
    try:
        found = str(json.loads(index.read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{model} is no folder as save_pretrained writes it ({error}); write one, or shapes"
        ) from error
    known = {kind.pipeline_class: name for name, kind in BACKBONES.items() if issubclass(kind, PipelineBackbone)}
    if found not in known:
        raise ConfigError(f"{index} is of {found}; supported are {', '.join(known)}")
    return known[found]


def parent(family: str, method: str, gb: int) -> str:
    """The shipped configuration to extend. Raises ConfigError where none fits one card of that size."""
    if family == "shapes":
        return f"shapes_{method}.yaml"
    if gb:
        fitting = [size for kind, size in CARDS if kind == family and size <= gb]
        if not fitting:
            sizes = ", ".join(f"{kind} from {size} GB" for kind, size in CARDS)
            raise ConfigError(f"no shipped configuration fits {family} on one card of {gb} GB; there are: {sizes}")
        return f"{CARDS[family, max(fitting)]}.yaml"
    if family == "qwen_image":
        raise ConfigError("nothing is shipped for qwen_image on a cluster; extend backbones/qwen_image.yaml by hand")
    return f"{family}_{method}.yaml"


def write(path: Path, wish: Wish) -> list[str]:
    """Write the file, check that it loads, and return the commands to go on with.

    Raises ConfigError for what is not known or does not fit, ValueError where the file is there already.
    """
    if path.exists():
        raise ValueError(f"{path} is there already; write another name, or remove it")
    if wish.method not in METHODS:
        raise ConfigError(nearest(wish.method, list(METHODS), "method"))
    family = family_of(wish.model)
    if family != "shapes" and wish.reward not in FILES:
        raise ConfigError(nearest(wish.reward, list(FILES), "reward"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(wish, family, parent(family, wish.method, wish.gb)))
    try:
        loading.load(path)
    except ConfigError:
        path.unlink()
        raise
    where = "--gpus 8x80GB" if not wish.gb else f"--gpus 1x{wish.gb}GB"
    fits = [] if family == "shapes" else [f"flowbp-ray plan {path} {where}"]
    return [f"flowbp-ray doctor {path}", *fits, f"flowbp-ray train {path}"]


def _text(wish: Wish, family: str, extends: str) -> str:
    lines = [
        "# Written by flowbp-ray init. Keys that are not here come from the file that it extends, which is shipped:",
        f"# {loading.shipped() / 'runs' / extends}",
        "# flowbp-ray config-reference says what each key means.",
        f"extends: {extends}",
        *_yaml("name", wish.name, "the run's folder below runs/"),
    ]
    if not extends.startswith(f"{family}_{wish.method}"):
        lines += _yaml("method", {"name": wish.method}, "flowbp-ray methods lists them with their arguments")
    if family != "shapes":
        lines += _yaml("backbone", {"path": wish.model}, "a folder as diffusers' save_pretrained writes it")
        sources = "a file, a pattern, a folder or hf://datasets/OWNER/NAME: docs/prompts.md"
        lines += _yaml("data", {"prompts": wish.prompts}, sources)
        other = "other prompts, to see what it does to those, or data:heldout with data.heldout"
        lines += _yaml("evaluation", {"prompts": None}, other)
        options, clip = FILES[wish.reward]
        term = {"name": wish.reward, "clip": clip, "options": options}
        lines += _yaml("rewards", {"terms": [term]}, "its files are yours to give: see docs/rewards.md")
    lines += _yaml("steps", 60 if family == "shapes" else 300, "optimizer steps; resume=auto goes on")
    return "\n".join(lines) + "\n"


def _yaml(key: str, value: Any, comment: str) -> list[str]:
    return [f"# {comment}", dump({key: value}).rstrip()]


def asked(given: Mapping[str, Any], ask: Callable[[str, str], str] | None) -> Wish:
    """The wish of what was given, and where nothing was, of what is answered. ask: takes a question and a default.

    Raises ValueError, naming the option, where something is missing and nobody can be asked, or is of no use.
    """
    questions = {
        "model": ("a diffusers folder, or shapes for the embedded model", "shapes"),
        "method": (f"method ({', '.join(METHODS)})", "flowbp_sparse"),
        "reward": (f"reward ({', '.join(FILES)})", "hpsv2"),
        "prompts": ("file of prompts", "prompts.txt"),
        "gb": ("GB of your one GPU, or 0 for eight of 80 GB", "24"),
    }
    found = dict(given)
    for key, (question, default) in questions.items():
        own = found.get("model") == "shapes" and key in ("reward", "prompts", "gb")
        if found.get(key) is not None:
            if own:
                raise ValueError(f"--{key} is not for the model shapes, which brings its own; leave it out")
            continue
        if own:
            found[key] = 0 if key == "gb" else ""
        elif ask is None:
            raise ValueError(f"--{key} is missing and there is no terminal to ask on; write --{key} {default}")
        else:
            found[key] = ask(question, default)
    try:
        gb = int(found["gb"])
    except ValueError as error:
        raise ValueError(f"--gb must be a number of GB such as 24, got {found['gb']!r}") from error
    model, method, reward, prompts = (str(found[key]) for key in ("model", "method", "reward", "prompts"))
    return Wish(re.sub(r"[^\w.+-]+", "_", str(found["name"])), model, method, reward, prompts, gb)
