"""What turns summed gradients into a step: plain torch on one rank (here), or DeepSpeed ZeRO over several (`zero`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.learning.optim import Ema, adamw, needed, set_rate
from flowbp_ray.messages import TensorChecksum
from flowbp_ray.weights.buckets import Bucket, lay_out, stretch
from flowbp_ray.weights.fingerprint import checksum
from flowbp_ray.weights.trainable import install, trained


class Engine(Protocol):
    """One optimizer over one module. `backward` is called once per forward and `step` once after the last."""

    module: nn.Module
    bare: nn.Module
    """For forwards whose gradients are no part of a step; not at ZeRO stage 3, where the parameters are apart."""
    scale: float
    """What cotangents are multiplied by, so that an engine that averages over ranks gives their sum."""
    ema: Ema | None

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of a scalar, unscaled: the gradient at the states is read too. `last` ends a step."""

    def step(self, rate: float) -> float:
        """Clip, update at this learning rate, average, clear the gradients.

        Returns the global gradient norm before clipping, the same on all ranks. Where it is not finite nothing was
        updated, the moments and the average included.
        """
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of each trained parameter as it is published, in the module's order."""
        ...

    def parts(self, buckets: Sequence[Bucket], ema: bool = False) -> Iterator[dict[str, Tensor]]:
        """One bucket of trained parameters (or of their average) after the other, whole, in the module's dtype.

        Every rank goes through all of them; what it gets holds until it asks for the next. Of the average a rank may
        get its own buckets only, and nothing for the others.
        """
        ...

    def checksums(self, ema: bool = False) -> dict[str, TensorChecksum]:
        """This rank's share of the checksum of each trained parameter: from the masters, not from `weights`."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class TorchEngine:
    """AdamW on one rank. Of a module in half precision it trains fp32 masters, and copies them back after a step."""

    scale = 1.0

    def __init__(self, module: nn.Module, config: LearnersConfig) -> None:
        self.module = self.bare = module
        self.max_grad_norm, self.device = config.optimizer.max_grad_norm, config.device
        self.named = trained(module)
        lay_out(self.named)
        self.shown = {name: p.detach() for name, p in self.named.items()}  # the same memory, for who only reads
        self.masters: dict[str, nn.Parameter] = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for name, p in self.named.items()
        }
        self.optimizer = adamw(list(self.masters.values()), config.optimizer)
        self.ema = Ema(list(self.masters.values()), config.ema.decay) if config.ema else None

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, rate: float) -> float:
        masters = list(self.masters.values())
        for name, p in self.named.items():
            if p is not self.masters[name]:
                self.masters[name].grad = None if p.grad is None else p.grad.float()
        norm = float(torch.nn.utils.clip_grad_norm_(masters, self.max_grad_norm))
        if norm < float("inf"):
            set_rate(self.optimizer, rate)
            self.optimizer.step()
            self._copy_back()
            if self.ema is not None:
                self.ema.update(masters)
        self.optimizer.zero_grad(set_to_none=True)
        self.module.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _copy_back(self) -> None:
        for name, p in self.named.items():
            if p is not self.masters[name]:
                p.copy_(self.masters[name])

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """All trained parameters (or their average) at once, in the module's dtype: for one process without Ray."""
        if not ema:
            return dict(self.shown)
        return {name: average.to(self.named[name].dtype) for name, average in self._masters(True).items()}

    def sizes(self) -> dict[str, int]:
        return {name: p.nbytes for name, p in self.named.items()}

    def parts(self, buckets: Sequence[Bucket], ema: bool = False) -> Iterator[dict[str, Tensor]]:
        averages = self._masters(True) if ema else {}
        for bucket in buckets:
            own = {name: self.shown[name] for name in bucket.names}
            if not ema:
                yield own
                continue
            _, cast = stretch({name: (p.shape, p.dtype) for name, p in own.items()}, self.device)
            for name, tensor in cast.items():
                tensor.copy_(averages[name])
            yield cast

    def checksums(self, ema: bool = False) -> dict[str, TensorChecksum]:
        cast = {name: m.detach().to(self.named[name].dtype) for name, m in self._masters(ema).items()}
        return {name: TensorChecksum.of(m, checksum(m)) for name, m in cast.items()}

    def _masters(self, ema: bool) -> Mapping[str, Tensor]:
        return dict(zip(self.masters, needed(self.ema).average, strict=True)) if ema else self.masters

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {"masters": {k: v.detach() for k, v in self.masters.items()}, "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"ema": self.ema.state() if self.ema else []}, folder / "engine.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "engine.pt", weights_only=True, map_location="cpu")
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state["masters"][name])
        install(self.module, {name: m.to(self.named[name].dtype) for name, m in state["masters"].items()})
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load(state["ema"])
