"""What travels between the processes: frozen dataclasses, and tensors as numpy arrays.

Ray moves numpy arrays without a copy. bf16 has no numpy dtype, so it travels as a uint16 view of the same bytes.
Torch is imported by those who pack or unpack: to read a message takes none (see `actors.emulated`).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.utils.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A tensor on its way: `array` holds the bytes, `dtype` the torch dtype's name ("bfloat16" travels as uint16)."""

    array: np.ndarray
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)


def pack(tensor: Tensor) -> Packed:
    """Turn a tensor of any device and dtype into a `Packed` one (contiguous, on the host)."""
    import torch

    host = tensor.detach().to("cpu").contiguous()
    name = str(host.dtype).removeprefix("torch.")
    return Packed((host.view(torch.uint16) if host.dtype == torch.bfloat16 else host).numpy(), name)


def unpack(packed: Packed) -> Tensor:
    """Give back the tensor. What was read from the object store is read-only: copy before writing into it."""
    import torch

    _warned()
    tensor = torch.from_numpy(packed.array)
    return tensor.view(torch.bfloat16) if packed.dtype == "bfloat16" else tensor


@lru_cache(maxsize=1)
def _warned() -> None:
    """Let torch give its warning of read-only arrays unheard. It comes once; hushing it per tensor took 20 us each."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(np.frombuffer(b"0", dtype=np.uint8))


def pack_all(tensors: Mapping[str, Tensor]) -> dict[str, Packed]:
    return {name: pack(tensor) for name, tensor in tensors.items()}


def unpack_all(tensors: Mapping[str, Packed]) -> dict[str, Tensor]:
    return {name: unpack(packed) for name, packed in tensors.items()}


@dataclass(frozen=True, order=True)
class Version:
    """Which weights: those after `step` optimizer steps of learner incarnation `incarnation`, or their average."""

    incarnation: int
    step: int
    ema: bool = False


@dataclass(frozen=True)
class Fault:
    """A value that is not finite. what: velocity, base velocity, learner velocity, score, cotangent or gradient."""

    what: str
    step: int
    sample: int  # global index in the step's batch
    prompt: int  # prompt id
    node: int | None = None
    reward: str | None = None

    def describe(self, prompts: Sequence[str]) -> str:
        """One line that names what is known."""
        where = ("" if self.node is None else f" at node {self.node}") + (f" of {self.reward}" if self.reward else "")
        who = f"step {self.step}, sample {self.sample}, prompt {prompts[self.prompt]!r}"
        return f"{self.what}{where} is not finite: {who}"


@dataclass(frozen=True)
class Item:
    """One micro-batch of fixed composition. It determines its `Rollout` completely: done twice, anywhere, same bits.

    prompt_ids and samples have one entry per row; `samples` are global sample indices within the step and key the
    noise. `plans` holds one plan per row, and is empty for an evaluation, where only the finished latent is wanted.
    """

    purpose: str  # "train" or the name of an evaluation: keys nothing but the log
    step: int
    index: int
    prompt_ids: tuple[int, ...]
    samples: tuple[int, ...]
    plans: tuple[Plan, ...]
    seed: int
    num_steps: int
    guidance: float
    version: Version

    @property
    def rows(self) -> int:
        return len(self.prompt_ids)


@dataclass(frozen=True)
class Rollout:
    """What a learner needs of an item: states [R, ...] sample-major, as `gather_states` lays them out.

    velocities: where the drift meter is on, the cached velocities at those states that the learner's compare with.
    base: with a base penalty, what the learner's would be there before any training.
    """

    item: Item
    states: Packed
    velocities: Packed | None = None
    base: Packed | None = None


@dataclass(frozen=True)
class RolloutReport:
    """The small part of a rollout, read by the driver. omega, residuals and kept have one entry per row.

    fingerprint: of the weights that the sampler held (see `fingerprint`). A row with a fault is not kept.
    Bytes are of what travels: the item itself (pickled), its states, the drift meter's velocities, the base's, its
    targets; and of what reached the sampler since its last report: weights, and embeddings, which come once and never
    with an item.
    """

    step: int
    index: int
    version: Version
    omega: tuple[float, ...]
    residuals: tuple[tuple[float, float], ...]
    kept: tuple[bool, ...]
    item_bytes: int
    state_bytes: int
    velocity_bytes: int
    base_bytes: int
    target_bytes: int
    seconds: float
    load_seconds: float
    weight_bytes: int = 0
    embedding_bytes: int = 0
    fingerprint: str = ""
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Scored:
    """Scores of one item. scores[name] is [rows][branches]; clipped[name] the share of rows without gradient.

    gram: per row, [terms][terms], the products of the terms' gradients at the images (see `rewards.balance`). The
    cotangent of a row with a fault is zero; with `rewards.balance` there is one per term, [terms, rows, ...].
    """

    step: int
    index: int
    scores: Mapping[str, tuple[tuple[float, ...], ...]]
    losses: tuple[float, ...]
    clipped: Mapping[str, float]
    gram: tuple[tuple[tuple[float, ...], ...], ...]
    cotangent_bytes: int
    seconds: float
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Evaluated:
    """Held-out scores (name -> one float per row) and pictures [rows, H, W, 3] uint8 of an evaluation item.

    drawn: per row whether its latent was finite; where not, the scores are NaN and the picture shows nothing.
    """

    index: int
    scores: Mapping[str, tuple[float, ...]]
    drawn: tuple[bool, ...]
    images: np.ndarray
    seconds: float


@dataclass(frozen=True)
class StepReport:
    """Numbers of one optimizer step on one rank.

    grad_norm: global, before clipping; where it is not finite nothing was updated. drift: per row, where metered.
    moved: per row, with a base penalty: the mean square of what the velocities differ from the base's (see `Watch`).
    """

    step: int
    rank: int
    grad_norm: float
    learning_rate: float
    forwards: int
    rows: int
    padding: int
    seconds: float
    drift: tuple[float, ...] = ()
    moved: tuple[float, ...] = ()
    faults: tuple[Fault, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """What encoding took. found and encoded count texts, the empty prompt among them; nbytes: of both, in memory.

    broken: files of the cache that had to be made again. folder: of the cache, None where there is none.
    """

    found: int
    encoded: int
    nbytes: int
    broken: tuple[Path, ...] = ()
    folder: Path | None = None

    def describe(self) -> str:
        """One line."""
        again = f" ({len(self.broken)} of them in place of a broken file)" if self.broken else ""
        where = "no cache" if self.folder is None else f"cache {self.folder}"
        texts = f"{self.found + self.encoded} distinct prompts, {format_bytes(self.nbytes, 'MiB')}"
        return f"{texts}: {self.found} were there, {self.encoded} encoded{again}; {where}"


@dataclass(frozen=True)
class TensorChecksum:
    """What one rank knows of one tensor: the whole's shape and dtype, and the checksum of its own fragments."""

    shape: tuple[int, ...]
    dtype: str
    value: int

    @classmethod
    def of(cls, tensor: Tensor, value: int) -> TensorChecksum:
        return cls(tuple(tensor.shape), str(tensor.dtype), value)


def combine(ranks: Sequence[Mapping[str, TensorChecksum]]) -> str:
    """The fingerprint (see `fingerprint`) from what each rank holds; the order of the names does not matter."""
    lines = []
    for name, first in sorted(ranks[0].items()):
        value = (sum(rank[name].value for rank in ranks) + (1 << 63)) % (1 << 64) - (1 << 63)
        lines.append(f"{name} {first.shape} {first.dtype} {value}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
