"""Folders and files of reward models as downloads, copies and other tools leave them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.rewards import base
from flowbp_ray.rewards.shapes_clip import WEIGHTS
from tests.badinput.outcome import Case
from tests.badinput.weight_cases import Runs
from tests.rewards.published_files import write_image_reward
from tests.rewards.test_hpsv3 import write_hpsv3
from tests.rewards.tiny_clip import aesthetic, clip, hpsv2, pictures
from tests.small import small_overrides

PROMPTS = ["a red circle", "two blue squares"]
NOT_READ = ("README.md", "card.json", "tiny-hps.json")


def _embedded(name: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        shutil.copytree(WEIGHTS / name, folder / name)
        return {"folder": str(folder / name)}

    return write


WRITERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "shapes_clip": _embedded("shapes_clip"),
    "shapes_detector": _embedded("shapes_detector"),
    "pickscore": lambda folder: clip(folder) | {"scale": 0.1},
    "clipscore": clip,
    "aesthetic": aesthetic,
    "hpsv2": hpsv2,
    "image_reward": lambda folder: dict(write_image_reward(folder)),
    "hpsv3": write_hpsv3,
}
"""Each reward that has files, and what writes small ones of the published layout and returns its options."""

BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "cut in half": lambda raw: raw[: len(raw) // 2],
    "a page of HTML": lambda raw: b"<!DOCTYPE html><html>404</html>" * 9,
    "a pointer of git-lfs": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
}


def _tensors(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a file of weights again after `change`."""
    if file.suffix == ".safetensors":
        changed = {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}
        save_file(changed, file, {"format": "pt"})
        return
    whole = torch.load(file, weights_only=True)
    torch.save(whole | {"state_dict": change(whole["state_dict"])} if "state_dict" in whole else change(whole), file)


def _read(tensors: dict[str, Any]) -> str:
    """The name of one that a score depends on, and whose shape says nothing about the model's size: a bias."""
    return sorted(n for n, t in tensors.items() if n.endswith("bias") and t.is_floating_point())[0]


def _first(tensors: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    name = _read(tensors)
    return {**tensors, name: change(tensors[name])}


def _without_the_first(tensors: dict[str, Any]) -> dict[str, Any]:
    name = _read(tensors)
    return {n: t for n, t in tensors.items() if n != name}


OF_WEIGHTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a wrong shape": ("refuse", lambda file: _tensors(file, lambda t: _first(t, lambda x: x[:-1].clone()))),
    "a tensor missing": ("refuse", lambda file: _tensors(file, _without_the_first)),
    "a NaN": ("refuse", lambda file: _tensors(file, lambda t: _first(t, lambda x: x * float("nan")))),
    "fp64": (
        "",
        lambda file: _tensors(file, lambda t: {k: v.double() if v.is_floating_point() else v for k, v in t.items()}),
    ),
    "a pickle that runs a command": ("refuse", lambda file: torch.save(Runs(), file)),
}


def _harms(file: Path) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Name, what may become of it, and the harm to do, for each that fits a file."""
    yield "missing", "", file.unlink
    for name, change in BYTES.items():
        yield name, "", lambda change=change: file.write_bytes(change(file.read_bytes()))
    if file.suffix == ".json":
        plain = json.loads(file.read_text())
        yield "a list", "", lambda: file.write_text("[]")
        yield "with a BOM", "", lambda: file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        for key in plain if isinstance(plain, dict) and len(plain) < 40 else ():
            rest = {k: v for k, v in plain.items() if k != key}
            yield f"without {key}", "", lambda rest=rest: file.write_text(json.dumps(rest))
            yield f"{key} of another type", "", lambda key=key: file.write_text(json.dumps({**plain, key: {"a": [-1]}}))
    if file.suffix in (".safetensors", ".pt", ".pth"):
        for name, (may, harm) in OF_WEIGHTS.items():
            yield name, may, lambda harm=harm: harm(file)


def reward_cases(folder: Path, only: Sequence[str] = (), every: int = 1) -> Iterator[Case]:
    """Each reward's files with each harm done to one of a copy.

    only: names of rewards, none for all. every: take one of so many.
    """
    os.environ["BAD_INPUT_RAN"] = str(folder / "it_ran")
    number = 0
    for reward, write in WRITERS.items():
        if only and reward not in only:
            continue
        whole = folder / reward
        whole.mkdir()
        options = write(whole)
        scores = base.build(reward, **options).score(pictures(2, 64, 64), PROMPTS)
        files = sorted(file.relative_to(whole) for file in whole.rglob("*") if file.is_file())
        for file in files:
            if file.name in NOT_READ:
                continue
            for harm, may, _ in list(_harms(whole / file)):
                number += 1
                if number % every:
                    continue
                copy = folder / "copy" / reward
                shutil.rmtree(copy.parent, ignore_errors=True)
                shutil.copytree(whole, copy)
                next(do for name, _, do in _harms(copy / file) if name == harm)()
                given = {k: v.replace(str(whole), str(copy)) if isinstance(v, str) else v for k, v in options.items()}
                yield Case(
                    "reward model",
                    f"{reward}, {file}: {harm}",
                    "shapes_flowbp_sparse",
                    [*small_overrides(folder), f"rewards.terms={json.dumps([{'name': reward, 'options': given}])}"],
                    [file.name, str(copy)],
                    lambda config, _, want=scores: _scores_as(config, want),
                    may,
                )
    assert not (folder / "it_ran").exists()


def _scores_as(config: RunConfig, want: torch.Tensor) -> bool:
    """What was accepted is built, and gives the scores of the files that nothing was done to."""
    [term] = config.rewards.terms
    found = base.build(term.name, **term.options).score(pictures(2, 64, 64), PROMPTS)
    return torch.allclose(found, want, rtol=1e-4, atol=1e-5)
