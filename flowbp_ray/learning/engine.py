"""Training engines: they accumulate gradients and update. Plain torch on one rank is here, ZeRO in `deepspeed`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.learning.moments import load_moments, moments_of
from flowbp_ray.learning.optim import Ema, adamw, require_ema, set_rate
from flowbp_ray.run.engine_state import AVERAGE, MASTER, EngineState, Fragment, write_state
from flowbp_ray.utils.checksums import TensorChecksum
from flowbp_ray.weights.buckets import Bucket, allocate_contiguous, make_contiguous
from flowbp_ray.weights.fingerprint import checksum
from flowbp_ray.weights.trainable import trained


class Engine(Protocol):
    """One optimizer over one module. Call `backward` once per forward and `step` once after the last."""

    module: nn.Module
    bare: nn.Module
    """The module for forwards whose gradients are not part of a step. Not at ZeRO stage 3, which partitions weights."""
    scale: float
    """The factor for cotangents that makes an engine that averages over ranks compute their sum."""
    ema: Ema | None

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of a scalar, unscaled, because the sweep reads the gradient at the states too.

        last: whether this is the last call before `step`.
        """

    def step(self, rate: float) -> float:
        """Clip the gradients, update with learning rate `rate`, update the EMA, clear the gradients.

        Returns the global gradient norm before clipping, the same on all ranks. If it is not finite, nothing was
        updated, neither the weights nor the moments nor the EMA.
        """
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes of each trained parameter in the published dtype, in the module's order."""
        ...

    def parts(self, buckets: Sequence[Bucket], ema: bool = False) -> Iterator[dict[str, Tensor]]:
        """Yield, bucket after bucket, the whole trained parameters (with `ema` their average) in the module's dtype.

        Every rank must iterate over all buckets. The tensors are valid until the next bucket is requested. With `ema`
        a rank may get an empty dict for other ranks' buckets.
        """
        ...

    def checksums(self, ema: bool = False) -> dict[str, TensorChecksum]:
        """This rank's part of the checksum of each trained parameter, from the masters and not from `parts`."""
        ...

    def fragments(self) -> list[Fragment]:
        """What this rank owns of the state, without copying."""
        ...

    def save(self, folder: Path, own: Iterable[Fragment] | None = None) -> dict[str, str]:
        """Write this rank's part of the state below a checkpoint's folder; return the sha256 of its files by name.

        own: the fragments of an earlier moment, copied; None: those of now.
        """
        ...

    def load(self, folder: Path) -> None:
        """Take over the state that any engine on any number of ranks has saved. Every rank must call it.

        Raises ConfigError where it is not of these parameters, or not whole.
        """
        ...


class TorchEngine:
    """AdamW on one rank. For a half-precision module it trains fp32 masters and copies them back after each step."""

    scale = 1.0

    def __init__(self, module: nn.Module, config: LearnersConfig) -> None:
        self.module = self.bare = module
        self.config, self.max_grad_norm, self.device = config, config.optimizer.max_grad_norm, config.device
        self.named = trained(module)
        make_contiguous(self.named)
        self.shown = {name: p.detach() for name, p in self.named.items()}  # the same memory, for reading
        self.masters: dict[str, nn.Parameter] = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for name, p in self.named.items()
        }
        self.optimizer = adamw(list(self.masters.values()), config.optimizer, config.device)
        self.ema = Ema(list(self.masters.values()), config.ema) if config.ema else None

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, rate: float) -> float:
        masters = list(self.masters.values())
        for name, p in self.named.items():
            if p is not self.masters[name]:  # one after the other, so that both gradients never exist in full
                self.masters[name].grad, p.grad = None if p.grad is None else p.grad.float(), None
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
        """All trained parameters (with `ema` their average) in the module's dtype, for a single process without Ray."""
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
            _, cast = allocate_contiguous({name: (p.shape, p.dtype) for name, p in own.items()}, self.device)
            for name, tensor in cast.items():
                tensor.copy_(averages[name])
            yield cast

    def checksums(self, ema: bool = False) -> dict[str, TensorChecksum]:
        def of(name: str, master: Tensor) -> TensorChecksum:
            cast = master.detach().to(self.named[name].dtype)
            return TensorChecksum.of(cast, checksum(cast))

        return {name: of(name, master) for name, master in self._masters(ema).items()}

    def _masters(self, ema: bool) -> Mapping[str, Tensor]:
        return dict(zip(self.masters, require_ema(self.ema).average, strict=True)) if ema else self.masters

    def fragments(self) -> list[Fragment]:
        averages = self._masters(True) if self.ema else {}

        def fragment(name: str, master: Tensor) -> Fragment:
            updates, moments = moments_of(self.optimizer, master)
            average = {AVERAGE: averages[name].view(-1)} if averages else {}
            tensors = {MASTER: master.detach().view(-1)} | moments | average
            return Fragment(name, tuple(master.shape), 0, updates, tensors)

        return [fragment(*named) for named in self.masters.items()]

    def save(self, folder: Path, own: Iterable[Fragment] | None = None) -> dict[str, str]:
        return write_state(folder, self.fragments() if own is None else own, 0, 1, self.config.moves)

    def load(self, folder: Path) -> None:
        saved = EngineState(folder)
        saved.check({name: tuple(master.shape) for name, master in self.masters.items()})
        averages = self._masters(True) if self.ema else {}
        for name, master in self.masters.items():
            saved.fill(master.detach().view(-1), MASTER, name)
            load_moments(self.optimizer, master, saved, name, self.config.optimizer.moments == "int8")
            if averages:
                saved.fill(averages[name].view(-1), AVERAGE, name)
        self._copy_back()
