"""Export a checkpoint: adapters that diffusers' pipelines load, or a transformer folder, with a model card.

README.md                            the model card
flowbp_ray.yaml                      the run's configuration, which `train` takes again
images/                              pictures of held-out prompts, where the run has drawn them with these weights
pytorch_lora_weights.safetensors     of a LoRA run: what `load_lora_weights` takes
<name of the run>.safetensors        instead of that, in the form of another tool (`formats`)
transformer/                         of any other run, or with `merge`: what `from_pretrained` takes
"""

from __future__ import annotations

import importlib
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbp_ray.artifacts import formats
from flowbp_ray.artifacts.card import model_card
from flowbp_ray.artifacts.card_pictures import save_pictures
from flowbp_ray.artifacts.card_use import Kind
from flowbp_ray.backbones import Backbone
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.rollout.sampler import Sampler
from flowbp_ray.run.folder import Run
from flowbp_ray.utils import accelerator
from flowbp_ray.utils.digest import digest
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.files import naming
from flowbp_ray.weights import trainable


@dataclass(frozen=True)
class Exported:
    """What was written: the checkpoint's step, and whether it is adapters, all weights, or adapters merged."""

    step: int
    kind: Kind


def export(
    run: Run,
    to: Path,
    step: int | None = None,
    average: bool = False,
    merge: bool = False,
    form: str = "diffusers",
    base_model: str | None = None,
) -> Exported:
    """Write a checkpoint of `run` (the newest by default) to the new folder `to`, in the dtype that it computes in.

    average: the average of the weights instead of the weights. merge: adapters added into the base's weights, those of
    the folder also where the run held them quantised, which the card says. form: see `formats.Format`.
    base_model: see `model_card`.
    The folder gets its name when it is complete. Raises ConfigError for what the user must change.
    """
    config, target = run.config, to.resolve()
    kind = _kind(config, merge)
    formats.check_format(form, config.backbone.name, kind == "lora")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{to} is there already and is not an empty folder; write another --to")
    used, tensors = run.checkpoints.weights(step, average)
    if average and not run.checkpoints.has_average(used):
        raise ConfigError(f"{run.folder} keeps no average; leave out --ema, or train with learners.ema.decay=0.999")
    device = config.samplers.device if accelerator.available() else "cpu"
    dense = config.backbone.model_copy(update={"quantization": None})  # adapters are the same over either base
    sampler = Sampler(dense, lora=config.learners.lora, seed=config.seed, device=device)
    trainable.install(sampler.transformer, tensors)
    with _new_folder(target) as partial:
        if form == "diffusers":
            _save(sampler.transformer, sampler.backbone, kind, partial)
        else:
            _save_as(form, config, sampler.transformer, partial / f"{run.folder.resolve().name}.safetensors")
        shutil.copyfile(run.folder / "config.yaml", partial / "flowbp_ray.yaml")
        shown = save_pictures(run, used, average, partial)
        text = model_card(run, sampler.backbone, kind, used, average, digest(tensors), form, shown, base_model)
        (partial / "README.md").write_text(text, encoding="utf-8")
    return Exported(used, kind)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder that gets the name `target` if nothing fails, and goes otherwise. Raises OSError that names `target`."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with naming(target, partial):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            yield partial
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _kind(config: RunConfig, merge: bool) -> Kind:
    if config.learners.lora is not None:
        return "merged" if merge else "lora"
    if merge:
        raise ConfigError("the run trains all weights, there is nothing to merge; leave out --merge")
    return "full"


def _save(transformer: Any, backbone: Backbone, kind: Kind, folder: Path) -> None:
    """The weights in diffusers' own formats, by its own writers."""
    if kind == "lora":
        _save_adapters(transformer, backbone, folder)
        return
    if kind == "merged":
        _merge(transformer)
    transformer.save_pretrained(folder / "transformer")


def _save_as(form: str, config: RunConfig, transformer: Any, file: Path) -> None:
    """The adapters in the form of another tool, as they were trained: the scale is in the file's alpha."""
    from peft.utils import get_peft_model_state_dict

    assert config.learners.lora is not None
    layers = get_peft_model_state_dict(transformer)
    alpha = float(config.learners.lora.alpha)
    alone = dict(transformer.named_modules())
    formats.write(form, config.backbone.name, layers, alpha, lambda layer: alone[layer].out_features, file, file.stem)


def _merge(transformer: Any) -> None:
    """Add the adapters into the weights in fp32, and round once to what each weight was."""
    before = {name.replace(".base_layer", ""): tensor.dtype for name, tensor in _tensors(transformer)}
    transformer.to("cpu").float()
    transformer.fuse_lora()
    transformer.unload_lora()
    for name, tensor in _tensors(transformer):
        tensor.data = tensor.data.to(before[name])


def _tensors(module: Any) -> list[tuple[str, Any]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _save_adapters(transformer: Any, backbone: Backbone, folder: Path) -> None:
    """The adapters with alpha = rank, which is what readers of the tensors alone take it for, and peft's configuration.

    The scale alpha / rank is multiplied into lora_B: without rounding where it is a power of two.
    """
    from peft.utils import get_peft_model_state_dict

    pipeline = getattr(importlib.import_module("diffusers"), backbone.pipeline_class)
    settings = transformer.peft_config["default"].to_dict()
    scale = settings["lora_alpha"] / settings["r"]
    layers = get_peft_model_state_dict(transformer)
    pipeline.save_lora_weights(
        folder,
        transformer_lora_layers={k: v * scale if ".lora_B." in k else v for k, v in layers.items()},
        # sets have no order of their own: sorted, the same checkpoint gives the same metadata
        transformer_lora_adapter_metadata={
            k: sorted(v) if isinstance(v, set) else v for k, v in {**settings, "lora_alpha": settings["r"]}.items()
        },
    )
