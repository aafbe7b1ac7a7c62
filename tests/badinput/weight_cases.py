"""Model folders as downloads, conversions and other tools leave them."""

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
from flowbp_ray.shapes import model_dir
from tests.badinput.outcome import Case
from tests.small import small_overrides

TRANSFORMER = "diffusion_pytorch_model.safetensors"


class Harm:
    """What is done to a copy of a model's folder. Files of the copy are links: they are replaced, never written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, part: str) -> Path:
        return next((self.folder / part).glob("*.safetensors"))

    def replace(self, file: Path, raw: bytes) -> None:
        file.unlink()
        file.write_bytes(raw)

    def tensors(self, part: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
        """Write a part's weights again after `change`."""
        file = self.file(part)
        changed = {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}
        file.unlink()
        save_file(changed, file, {"format": "pt"})

    def shards(self, part: str, missing: bool) -> None:
        """Write a part's weights as two files with an index; leave the second out."""
        file, tensors = self.file(part), load_file(self.file(part))
        names = sorted(tensors)
        stem = file.stem
        file.unlink()
        where = {name: f"{stem}-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
        for shard in sorted(set(where.values()))[: 1 if missing else 2]:
            save_file(
                {n: tensors[n].clone() for n in names if where[n] == shard}, file.with_name(shard), {"format": "pt"}
            )
        index = {"metadata": {}, "weight_map": where}
        (file.parent / f"{stem}.safetensors.index.json").write_text(json.dumps(index))

    def pickled(self, part: str, content: Any) -> None:
        """Put a pickle in the place of safetensors. content: None for the part's own weights."""
        file = self.file(part)
        own = load_file(file)
        file.unlink()
        stem = "diffusion_pytorch_model" if part in ("transformer", "vae") else "pytorch_model"
        torch.save(
            {k: v.clone() for k, v in own.items()} if content is None else content, file.with_name(f"{stem}.bin")
        )

    def config(self, part: str, **changed: Any) -> None:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        file = self.folder / part / name
        plain = {**json.loads(file.read_text()), **changed}
        self.replace(file, json.dumps({k: v for k, v in plain.items() if v is not ...}).encode())


class Runs:
    """Runs a command when it is unpickled, as a harmful file would."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(os.environ["BAD_INPUT_RAN"])),)


def _first(tensors: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    name = sorted(name for name, tensor in tensors.items() if tensor.dim() > 1)[0]
    return {**tensors, name: change(tensors[name])}


def _eight_bits(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}


HARM: dict[str, tuple[str, Callable[[Harm], Any]]] = {
    "truncated": ("refuse", lambda h: h.replace(h.file("transformer"), h.file("transformer").read_bytes()[:-1000])),
    "truncated header": ("refuse", lambda h: h.replace(h.file("vae"), h.file("vae").read_bytes()[:50])),
    "empty file": ("refuse", lambda h: h.replace(h.file("text_encoder"), b"")),
    "a page of HTML": ("refuse", lambda h: h.replace(h.file("transformer"), b"<!DOCTYPE html><html>404</html>" * 9)),
    "a pointer of git-lfs": (
        "refuse",
        lambda h: h.replace(h.file("vae"), b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
    ),
    "wrong shape": ("refuse", lambda h: h.tensors("transformer", lambda t: _first(t, lambda x: x[:-1]))),
    "wrong shape in the text encoder": (
        "refuse",
        lambda h: h.tensors("text_encoder", lambda t: _first(t, lambda x: x[:-1])),
    ),
    "a tensor missing": ("refuse", lambda h: h.tensors("transformer", lambda t: dict(list(t.items())[1:]))),
    "a tensor missing in the VAE": ("refuse", lambda h: h.tensors("vae", lambda t: dict(list(t.items())[1:]))),
    "a NaN": ("refuse", lambda h: h.tensors("transformer", lambda t: _first(t, lambda x: x * float("nan")))),
    "an infinity in a pickle": (
        "refuse",
        lambda h: (h.tensors("vae", lambda t: _first(t, lambda x: x * float("inf"))), h.pickled("vae", None)),
    ),
    "8-bit floats": ("accept", lambda h: h.tensors("transformer", _eight_bits)),
    "8-bit floats with scales": (
        "refuse",
        lambda h: h.tensors("transformer", lambda t: _eight_bits(t) | {"proj_out.scale_weight": torch.ones(1)}),
    ),
    "fp32 instead of fp16": (
        "accept",
        lambda h: h.tensors("transformer", lambda t: {k: v.float() for k, v in t.items()}),
    ),
    "two shards": ("accept", lambda h: h.shards("transformer", missing=False)),
    "a shard missing": ("refuse", lambda h: h.shards("transformer", missing=True)),
    "an index without a map": (
        "refuse",
        lambda h: (h.shards("vae", missing=False), h.replace(h.folder / "vae" / f"{TRANSFORMER}.index.json", b"{}")),
    ),
    "a pickle of tensors": ("accept", lambda h: h.pickled("transformer", None)),
    "a pickle that runs a command": ("refuse", lambda h: h.pickled("transformer", Runs())),
    "a pickle of something else": ("refuse", lambda h: h.pickled("vae", [1, 2, 3])),
    "only a variant": (
        "refuse",
        lambda h: h.file("transformer").rename(h.folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors"),
    ),
    "another name": ("refuse", lambda h: h.file("vae").rename(h.folder / "vae" / "ae.safetensors")),
    "no weights": ("refuse", lambda h: h.file("text_encoder").unlink()),
    "no text encoder": ("refuse", lambda h: shutil.rmtree(h.folder / "text_encoder")),
    "no tokenizer": ("refuse", lambda h: shutil.rmtree(h.folder / "tokenizer")),
    "no scheduler": ("refuse", lambda h: shutil.rmtree(h.folder / "scheduler")),
    "no VAE": ("refuse", lambda h: shutil.rmtree(h.folder / "vae")),
    "an empty tokenizer": ("refuse", lambda h: h.replace(h.folder / "tokenizer" / "tokenizer.json", b"")),
    "a config that is no JSON": ("refuse", lambda h: h.replace(h.folder / "transformer" / "config.json", b"{,}")),
    "a config with a BOM": (
        "accept",
        lambda h: h.replace(
            h.folder / "scheduler" / "scheduler_config.json",
            b"\xef\xbb\xbf" + (h.folder / "scheduler" / "scheduler_config.json").read_bytes(),
        ),
    ),
    "a config that is a list": ("refuse", lambda h: h.replace(h.folder / "vae" / "config.json", b"[]")),
    "a wrong value in a config": ("refuse", lambda h: h.config("transformer", num_attention_heads="eight")),
    "a wrong value in the VAE's": ("refuse", lambda h: h.config("vae", block_out_channels=[7, 7])),
    "another class": ("refuse", lambda h: h.config("transformer", _class_name="FluxTransformer2DModel")),
    "no shift": ("refuse", lambda h: h.config("scheduler", shift=...)),
    "a shift that is text": ("refuse", lambda h: h.config("scheduler", shift="three")),
    "an unknown dtype": ("refuse", lambda h: h.config("text_encoder", dtype="float7")),
    "another size than the weights'": ("refuse", lambda h: h.config("transformer", num_layers=1, sample_size=9)),
}


def weight_cases(folder: Path, only: Sequence[str] = ()) -> Iterator[Case]:
    """The embedded model's folder with each harm done to a copy. only: names of harms, none for all."""
    os.environ["BAD_INPUT_RAN"] = str(folder / "it_ran")
    for number, (name, (may, harm)) in enumerate(HARM.items()):
        if only and name not in only:
            continue
        copy = folder / f"model{number}"
        shutil.copytree(model_dir(), copy, copy_function=os.link)
        harm(Harm(copy))
        overrides = [*small_overrides(folder), f"backbone.path={copy}", f"encoder.cache={folder}/cache"]
        yield Case(
            "model folder",
            name,
            "shapes_flowbp_sparse",
            overrides,
            [copy.name],
            _loads if may == "accept" else None,
            may,
        )
    assert not (folder / "it_ran").exists()
    yield Case(
        "model folder", "no folder", "shapes_flowbp_sparse", [f"backbone.path={folder}/none"], ["none"], may="refuse"
    )


def _loads(config: RunConfig, _: object) -> bool:
    """What was accepted is loaded, with finite values near the embedded model's."""
    from flowbp_ray.backbones.registry import backbone_named, build_backbone

    ours = build_backbone(config.backbone).load_transformer(torch.float32).state_dict()
    theirs = backbone_named("shapes").load_transformer(torch.float32).state_dict()
    far = max(float((ours[k] - v).norm() / (v.norm() + 1e-3)) for k, v in theirs.items())
    return ours.keys() == theirs.keys() and far < 0.05
