"""The parameters that are trained and published: all of them, or low-rank adapters (peft)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowbp_ray.config.learners import LoraConfig

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def prepare(
    transformer: Any, lora: LoraConfig | None, seed: int, default_targets: Sequence[str] = ATTENTION
) -> nn.Module:
    """Set which parameters are trained. With `lora`, freeze the base and add adapters, initialised from `seed`.

    default_targets: the modules that get adapters if `lora.targets` is not set. Raises ValueError for a target that
    matches no module.
    """
    if lora is None:
        return transformer.requires_grad_(True)
    import peft

    transformer.requires_grad_(False)
    targets = list(lora.targets or default_targets)
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, init_lora_weights="gaussian")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            transformer.add_adapter(settings)
        except ValueError as error:
            raise ValueError(_no_module(targets)) from error
    if mismatched := [target for target in lora.targets or [] if not matched(target, adapted(transformer))]:
        raise ValueError(_no_module(mismatched))
    return transformer


def _no_module(targets: Sequence[str]) -> str:
    return f"learners.lora.targets={list(targets)} match no module of the model; write module names such as to_q"


@contextmanager
def adapters_off(transformer: Any) -> Iterator[None]:
    """Turn off the adapters inside the context, so that the transformer computes as its base does."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def trained(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in the module's order."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def describe(transformer: nn.Module, lora: LoraConfig | None) -> str:
    """Describe in a line how many parameters of a prepared module are trained, and where its adapters are."""
    total, count = (sum(p.numel() for p in ps) for ps in (transformer.parameters(), trained(transformer).values()))
    if lora is None:
        return f"all {total:,} parameters"
    places = adapted(transformer)
    kinds = sorted(t for t in transformer.peft_config["default"].target_modules if matched(t, places))  # type: ignore[operator, index, union-attr]
    return (
        f"adapters of rank {lora.rank} (alpha {lora.alpha}) on {len(places)} modules: {count:,} parameters beside "
        f"{total - count:,}; targets {', '.join(kinds)}"
    )


def adapted(transformer: nn.Module) -> list[str]:
    """The names of the modules that have an adapter."""
    return [name.split(".lora_A.")[0] for name in trained(transformer) if ".lora_A." in name]


def matched(target: str, places: Sequence[str]) -> bool:
    return any(place == target or place.endswith(f".{target}") for place in places)


def install(transformer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into the module in place. Raises ValueError unless their names are exactly the trained ones."""
    own = trained(transformer)
    check_names(own, tensors)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def check_names(own: Collection[str], given: Collection[str]) -> None:
    """Raise ValueError unless the given names are those of the trained parameters, in any order."""
    if set(own) != set(given):
        different = sorted(set(own) ^ set(given))[:3]
        raise ValueError(f"published weights do not fit: {len(given)} for {len(own)} parameters, e.g. {different}")
