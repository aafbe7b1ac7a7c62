"""The DeepSpeed engine: ZeRO stage 0–3 over the ranks of a process group, without DeepSpeed's launcher."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from flowbp_ray.config.learners import LearnersConfig
from flowbp_ray.learning.moments import begin_moments, moments_of
from flowbp_ray.learning.optim import Ema, adamw, require_ema, set_rate
from flowbp_ray.run.engine_state import AVERAGE, MASTER, EngineState, Fragment, write_state
from flowbp_ray.utils import accelerator
from flowbp_ray.utils.checksums import TensorChecksum
from flowbp_ray.weights.buckets import Bucket, allocate_contiguous, make_contiguous
from flowbp_ray.weights.fingerprint import checksum
from flowbp_ray.weights.group import serve_store
from flowbp_ray.weights.trainable import trained


class Unhooked(nn.Module):
    """A module without its hooks. DeepSpeed's hooks would accumulate gradients that are not part of a step."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


@dataclass(frozen=True)
class Place:
    """Elements start … start + length of a flat parameter, which are those from `offset` on of a rank's shard."""

    name: str
    shard: int
    offset: int
    start: int
    length: int

    def of(self, shard: Tensor) -> Tensor:
        """The view [length] of a tensor that lies as the shard does."""
        return shard.view(-1)[self.offset : self.offset + self.length]


class DeepSpeedEngine:
    """ZeRO stage 0–3 over the ranks of an already initialised process group."""

    def __init__(self, module: nn.Module, config: LearnersConfig, dtype: torch.dtype) -> None:
        import deepspeed

        self.stage, self.rank = config.zero, torch.distributed.get_rank()
        self.scale = float(torch.distributed.get_world_size())
        self.named = trained(module)
        self.shapes = {name: p.shape for name, p in self.named.items()}  # stage 3 leaves empty tensors behind
        self.config = config
        self.optimizer = adamw(list(self.named.values()), config.optimizer, config.device)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            config=deepspeed_config(config, dtype),
            dist_init_required=False,
        )
        self.module: nn.Module = self.engine
        self.bare: nn.Module = Unhooked(module)
        self.dtype, self.device = dtype, config.device
        if self.stage == 0:  # stages 1 and 2 keep them flat already; stage 3 partitions them
            make_contiguous(self.named)
        self.ema = Ema(self._shards(), config.ema) if config.ema else None

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self, rate: float) -> float:
        set_rate(self.optimizer, rate)
        norm = self._plain_norm() if self.stage == 0 else None
        if norm is not None and not math.isfinite(norm):
            self.engine.zero_grad()
            return norm
        self.engine.step()
        if norm is None:
            norm = float(self.engine.get_global_grad_norm())
        if norm < 0:  # older versions of DeepSpeed return -1 for a norm that is not finite
            norm = float("inf")
        if math.isfinite(norm) and self.ema is not None:
            self.ema.update(self._shards())
        return norm

    def _plain_norm(self) -> float:
        """The global gradient norm at stage 0, where each rank has the whole gradient.

        There DeepSpeed neither reports the norm nor skips an update whose norm is not finite.
        """
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.named.values() if p.grad is not None]))

    def sizes(self) -> dict[str, int]:
        return {name: shape.numel() * self.dtype.itemsize for name, shape in self.shapes.items()}

    def parts(self, buckets: Sequence[Bucket], ema: bool = False) -> Iterator[dict[str, Tensor]]:
        import deepspeed

        with require_ema(self.ema).swapped(self._shards()) if ema else nullcontext():
            for bucket in buckets:
                own = {name: self.named[name] for name in bucket.names}
                if ema and self.stage:
                    yield self._masters(own, bucket.rank)
                    continue
                apart = self.stage == 3 and bool(own)
                with deepspeed.zero.GatheredParameters(list(own.values())) if apart else nullcontext():
                    yield {name: p.detach() for name, p in own.items()}

    def _masters(self, named: Mapping[str, Any], owner: int) -> dict[str, Tensor]:
        """Gather the masters on rank `owner`, cast to the published dtype; an empty dict on the other ranks.

        Each rank casts its fragments before, so no rank holds whole tensors in fp32. Where one rank has a fragment the
        others have zeros, so the sum of the bits, read as integers, is the fragment's bits.
        """
        whole, views = allocate_contiguous({name: (self.shapes[name], self.dtype) for name in named}, self.device)
        for name, p in named.items():
            flat = views[name].view(-1)
            for start, piece in self._fragments(p):
                flat[start : start + len(piece)].copy_(piece)
        if named:
            torch.distributed.reduce(whole.view(torch.int32), owner)
        return views if self.rank == owner else {}

    def checksums(self, ema: bool = False) -> dict[str, TensorChecksum]:
        with require_ema(self.ema).swapped(self._shards()) if ema else nullcontext():
            own = {
                name: sum(checksum(piece.to(self.dtype), start) for start, piece in self._fragments(p))
                for name, p in self.named.items()
            }
        return {name: TensorChecksum(tuple(self.shapes[name]), str(self.dtype), value) for name, value in own.items()}

    def _shards(self) -> list[Tensor]:
        """This rank's fp32 masters: whole parameters at stage 0, flat partitions at stages 1 to 3."""
        if self.stage == 0:
            return list(self.named.values())
        optimizer = self.engine.optimizer
        flat = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        return list(flat)

    def _fragments(self, p: Any) -> list[tuple[int, Tensor]]:
        """This rank's fragments of a parameter's fp32 master, as (first flat index, values); may be empty."""
        if self.stage == 0:
            return [(0, p.detach())] if self.rank == 0 else []
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            piece = safe_get_local_fp32_param(p)
            start = self.rank * p.partition_numel()
            return [(start, piece[: max(0, p.ds_numel - start)])]  # the last shard is padded
        mapping = p._hp_mapping
        return [] if mapping is None else [(mapping.lp_fragment_address.start, mapping.get_hp_fragment())]

    def _places(self) -> Iterator[Place]:
        """Where in this rank's shards its part of each parameter is; at stage 0 every rank has all of them."""
        named: Mapping[str, Any] = self.named  # to whose parameters DeepSpeed adds attributes
        for index, (name, p) in enumerate(named.items()):
            place = Place(name, index, 0, 0, p.numel())
            if self.stage == 3:
                optimizer = self.engine.optimizer
                shard, offset, padded = optimizer.grad_position[optimizer.get_param_id(p)]
                start = self.rank * padded
                place = Place(name, shard, offset, start, min(padded, p.ds_numel - start))
            elif self.stage:
                if p._hp_mapping is None:
                    continue
                here, there = p._hp_mapping.hp_fragment_address, p._hp_mapping.lp_fragment_address
                place = Place(name, p._hp_mapping.param_group_index, here.start, there.start, there.numel)
            if place.length > 0:
                yield place

    def fragments(self) -> list[Fragment]:
        shards = self._shards()
        moments = [moments_of(self.optimizer, shard) for shard in shards]

        def fragment(place: Place) -> Fragment:
            updates, held = moments[place.shard]
            average = {AVERAGE: self.ema.average[place.shard]} if self.ema else {}
            whole = {MASTER: shards[place.shard].detach()} | held | average
            tensors = {kind: place.of(tensor) for kind, tensor in whole.items()}
            return Fragment(place.name, tuple(self.shapes[place.name]), place.start, updates, tensors)

        return [fragment(place) for place in self._places() if self.stage or self.rank == 0]

    def save(self, folder: Path, own: Iterable[Fragment] | None = None) -> dict[str, str]:
        own = self.fragments() if own is None else own
        return write_state(folder, own, self.rank, torch.distributed.get_world_size(), self.config.moves)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        saved, shards = EngineState(folder), self._shards()
        saved.check({name: tuple(shape) for name, shape in self.shapes.items()})
        moments = [begin_moments(self.optimizer, shard, saved.most_updates) for shard in shards]
        for place in self._places():
            average = {AVERAGE: self.ema.average[place.shard]} if self.ema else {}
            whole = {MASTER: shards[place.shard].detach()} | moments[place.shard] | average
            for kind, tensor in whole.items():
                saved.fill(place.of(tensor), kind, place.name, place.start)
        self._spread()

    def _spread(self) -> None:
        """Bring the masters into the module's parameters, on all ranks."""
        optimizer = self.engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        if self.stage == 3:
            optimizer.checkpoint_event_prologue()
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()


def deepspeed_config(config: LearnersConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's settings. Micro-batch and accumulation steps are 1, because the learner sums the batch itself."""
    sharding: dict[str, Any] = {"stage": config.zero}
    if config.interconnect == "pcie":
        sharding["overlap_comm"] = True
    if config.offload:
        sharding["offload_optimizer"] = {"device": "cpu", "pin_memory": config.device != "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": sharding,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }


def join_process_group(rank: int, config: LearnersConfig, address: str, port: int, timeout: float) -> None:
    """Join the learners' process group: gloo on CPUs, what DeepSpeed takes for the accelerator on GPUs (CUDA: NCCL).

    Call it before anything else imports DeepSpeed.
    The configuration chooses between them, not the machine: ranks that train on the CPU may run on a node with GPUs.
    timeout: seconds after which a collective operation fails.
    """
    on_gpu = config.device != "cpu"
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(config.count),
        "LOCAL_RANK": str(accelerator.current()) if on_gpu else "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": config.device,
    }
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if not on_gpu:
        __compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute, and only serves ranks on one host
        # By default gloo uses the address of this host's name: 127.0.1.1 on Debian, which no other host reaches.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_to(address))
    # The one that torch makes of MASTER_ADDR and MASTER_PORT is then this one, which other networks do not reach.
    served = serve_store(address, port, timeout, shared=True) if rank == 0 else None
    deepspeed.init_distributed(None if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
    del served


def interface_to(address: str) -> str:
    """The name of the network interface by which this host reaches `address` (may be its own); "" if none is found."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
    return next((name for name, found in psutil.net_if_addrs().items() if own in {a.address for a in found}), "")
