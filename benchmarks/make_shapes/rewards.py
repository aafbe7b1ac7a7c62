"""Stage `rewards`: train `shapes_clip` and `shapes_clip_heldout` on renderings and write them as package data.

The two differ in image tower (transformer over patches; residual convolutions with coordinate channels), text tower
(causal, read at the end token; bidirectional, averaged), loss (softmax; sigmoid), seed and data order. Only the first
is ever trained on. All randomness is seeded; one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.make_shapes.rewards_report import calibrate, report, write_card
from benchmarks.make_shapes.rewards_train import Recipe, train
from flowbp_ray.rewards.shapes_clip import END, PAD, SPECIAL, START, WEIGHTS, Words
from flowbp_ray.shapes.captions import MAX_WORDS, WORDS

LENGTH = MAX_WORDS + 4  # hard negatives can be two words longer than a caption
VOCABULARY = list(dict.fromkeys(WORDS))
SIZE = len(VOCABULARY) + len(SPECIAL)
CLIP_OPTIONS: dict[str, Any] = {
    "vision": {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 64, "patch_size": 8,
    },
    "text": {
        "vocab_size": SIZE, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": LENGTH,
        "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END,
    },
    "projection": 128,
}  # fmt: skip
CONV_OPTIONS: dict[str, Any] = {
    "widths": [24, 48, 96, 96], "text_width": 64, "text_layers": 2, "vocab_size": SIZE, "length": LENGTH,
    "projection": 128,
}  # fmt: skip
RECIPES = {
    "shapes_clip": Recipe("clip", CLIP_OPTIONS, 31, 3600, "softmax", 8, 128, rate=2e-3, adversary=2.0),
    "shapes_clip_heldout": Recipe(
        "conv", CONV_OPTIONS, 77, 1900, "sigmoid", 4, 96, pairs=24, damaged=16, rate=2e-3, adversary=1.0
    ),
}


def write(name: str, model: nn.Module, calibration: dict[str, float], facts: dict[str, Any], root: Path) -> None:
    """Write config.json and model.safetensors (fp16) of one model."""
    publish_as(name, name, model, calibration, facts, root)


def publish_as(
    name: str, build: str, model: nn.Module, calibration: dict[str, float], facts: dict[str, Any], root: Path = WEIGHTS
) -> None:
    """Write the folder of a model that is built as `build` is."""
    recipe, folder = RECIPES[build], root / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = {
        "architecture": recipe.architecture,
        "model": recipe.options,
        "vocabulary": VOCABULARY,
        "text_length": LENGTH,
        "calibration": calibration,
        "training": facts,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def make(name: str, steps: int, work: Path, root: Path = WEIGHTS) -> None:
    """Train, calibrate and write one model; work/ gets <name>.log and the fp32 checkpoint <name>.pt."""
    recipe = replace(RECIPES[name], steps=steps or RECIPES[name].steps)
    work.mkdir(parents=True, exist_ok=True)
    with (work / f"{name}.log").open("w") as lines:

        def log(line: str) -> None:
            print(line, file=lines, flush=True)

        def save(unfinished: nn.Module) -> None:
            torch.save(unfinished.state_dict(), work / f"{name}.pt")

        started = time.process_time()
        model = train(recipe, Words(VOCABULARY, LENGTH), log, save)
        cpu = time.process_time() - started
        save(model)
        publish(name, model, recipe, cpu, root)
        log(f"written after {cpu:.0f} CPU seconds")


def publish(name: str, model: nn.Module, recipe: Recipe, cpu: float, root: Path = WEIGHTS) -> None:
    """Write a trained model with its calibration and the facts of its training."""
    facts = {
        "seed": recipe.seed,
        "steps": recipe.steps,
        "batch": 2 * recipe.pairs + recipe.damaged,
        "loss": recipe.loss,
        "cpu_seconds": round(cpu),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    write(name, model, {"low": 0.0, "high": 1.0}, facts, root)
    write(name, model, calibrate(name, root), facts, root)


def digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe() -> None:
    """Measure both models on scenes they never saw and write the card."""
    digests = {name: digest(WEIGHTS / name / "model.safetensors") for name in RECIPES}
    write_card({name: report(name) for name in RECIPES}, digests)


def main(args: argparse.Namespace) -> None:
    """Train both models, measure them on scenes they never saw, write the card. Uses args.steps and args.work."""
    torch.set_num_threads(getattr(args, "threads", 1))
    for name in RECIPES:
        make(name, args.steps, args.work)
    describe()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", choices=[*RECIPES, "card"], help="what to make (default: everything)")
    parser.add_argument("--steps", type=int, default=0, help="0 = the recorded number")
    parser.add_argument("--work", type=Path, default=Path("runs/make_shapes"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for chosen in options.only:
        if chosen != "card":
            make(chosen, options.steps, options.work)
    if "card" in options.only:
        describe()
    elif not options.only:
        main(options)
