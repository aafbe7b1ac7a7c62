"""A run that has trained adapters goes on with all weights (docs/decisions/0008-checkpoints-by-parameter.md)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowbp_ray.backbones.frozen import load_base
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.learners import LoraConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.run.checkpoint import Snapshot
from flowbp_ray.run.engine_state import ADAPTER, AVERAGE, MASTER, EngineState, Fragment, write_state
from flowbp_ray.run.folder import FORMER, Run
from flowbp_ray.utils.errors import RunFailed
from flowbp_ray.weights import trainable


def widen(run: Run, config: RunConfig, note: Callable[[str], object]) -> None:
    """Where `config` trains all weights of a run of adapters, merge them into its newest checkpoint, and take `config`.

    The merged weights become the masters, their average is merged likewise, and AdamW's moments start anew: those of
    the adapters say nothing about the weights. Older checkpoints stay as they are, and so does the configuration, as
    config.adapters.yaml. note: takes a line that says so. It must not be interrupted by another driver: the lock is
    held. Whenever it is killed, the same command does it again.
    """
    lora = run.config.learners.lora
    if lora is None or config.learners.lora is not None:
        return
    line = "it has no checkpoint yet"
    if steps := run.checkpoints.steps():
        step = steps[-1]
        with run.checkpoints.reading(step):
            state = EngineState(run.checkpoints.path(step))
            if state.adapters:  # otherwise it was merged already
                merge(run, config, lora, state, step)
        line = f"the adapters of step {step} are merged into them, and AdamW's moments start anew"
    shutil.copyfile(run.folder / "config.yaml", run.folder / FORMER)
    run.take(config)
    line = f"from now on all weights are trained: {line}; the former configuration is {FORMER}"
    run.logger().info("%s", line)
    note(line)


def merge(run: Run, config: RunConfig, lora: LoraConfig, state: EngineState, step: int) -> None:
    """Replace the checkpoint of `step` by one of all weights. state: of the adapters, `lora`."""
    checkpoints, backbone, dtype = run.checkpoints, build_backbone(config.backbone), config.backbone.torch_dtype
    base = load_base(backbone, config.backbone, "cpu")
    model = trainable.prepare(base, lora, config.seed, backbone.lora_targets)
    state.check({name: tuple(p.shape) for name, p in trainable.trained(model).items()})
    kinds = [MASTER, *([AVERAGE] if config.learners.ema else [])]
    whole = {kind: merged(model, {name: state.whole(kind, name) for name in state.shapes}) for kind in kinds}
    own = [
        Fragment(name, tuple(master.shape), 0, 0, {kind: whole[kind][name].reshape(-1) for kind in kinds})
        for name, master in whole[MASTER].items()
    ]

    def cast(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(dtype) for name, tensor in weights.items()}

    versions = {version: cast(merged(model, held)) for version, held in checkpoints.versions(step).items()}
    evaluations, unjudged = checkpoints.evaluations(step), checkpoints.unjudged(step)
    average = cast(whole[AVERAGE]) if AVERAGE in whole else None
    snapshot = Snapshot(step, cast(whole[MASTER]), versions, evaluations, average, unjudged)
    try:
        written = write_state(checkpoints.begin(step), own, 0, 1, config.learners.moves)
        checkpoints.finish(snapshot, len(checkpoints.steps()), written=written)
    except (RunFailed, OSError):
        checkpoints.abandon(step)
        raise
    checkpoints.settle()


@torch.no_grad()
def merged(model: nn.Module, adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights in fp32, by their names without adapters: W + alpha / rank · B A (arXiv 2106.09685, section 4.1).

    adapters: by the names that they have in `model`, whose own are replaced.
    """
    named, modules = dict(model.named_parameters()), dict(model.named_modules())
    for name, value in adapters.items():
        named[name].data = value.float()
    found = {}
    for name, weight in named.items():
        if ADAPTER.search(name):
            continue
        value, (owner, _, part) = weight.detach().float(), name.rpartition(".base_layer.")
        if owner and part == "weight":
            layer: Any = modules[owner]
            value = value + layer.get_delta_weight("default")
        found[name.replace(".base_layer.", ".")] = value
    return found
