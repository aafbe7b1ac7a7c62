"""Messages between processes: frozen dataclasses that hold numbers and tensors, the tensors as numpy arrays.

Ray moves numpy arrays without a copy. numpy has no bf16 dtype, so bf16 travels as a uint16 view of the same bytes.
Only `pack` and `unpack` import torch, so a process can read messages without it (see `actors.emulated`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowbp_ray.surrogate.plan import Plan
from flowbp_ray.utils.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """A tensor in a message: `array` holds the bytes, `dtype` names the torch dtype ("bfloat16": a uint16 array)."""

    array: np.ndarray
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)


def pack(tensor: Tensor) -> Packed:
    """Convert a tensor of any device and dtype to a `Packed`. A contiguous tensor on the host is not copied."""
    import torch

    host = tensor.detach().to("cpu").contiguous()
    name = str(host.dtype).removeprefix("torch.")
    return Packed((host.view(torch.uint16) if host.dtype == torch.bfloat16 else host).numpy(), name)


def unpack(packed: Packed) -> Tensor:
    """Return the tensor, without a copy. One from the object store is read-only: copy it before writing into it."""
    import torch

    _warned()
    tensor = torch.from_numpy(packed.array)
    return tensor.view(torch.bfloat16) if packed.dtype == "bfloat16" else tensor


@lru_cache(maxsize=1)
def _warned() -> None:
    """Trigger and suppress torch's warning about read-only arrays.

    Torch warns once per process. Suppressing the warning for each tensor took 20 us per tensor.
    """
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
    """Names weights: those after `step` optimizer steps of learner incarnation `incarnation`; with `ema` their EMA."""

    incarnation: int
    step: int
    ema: bool = False


@dataclass(frozen=True)
class Fault:
    """A value that is not finite: a "(base |old |learner )velocity", a "score", a "cotangent" or a "gradient"."""

    what: str
    step: int
    sample: int  # global index in the step's batch
    prompt: int  # prompt id
    node: int | None = None
    reward: str | None = None

    def describe(self, prompts: Sequence[str]) -> str:
        """One line: what is not finite, and its node, reward, step, sample and prompt."""
        where = ("" if self.node is None else f" at node {self.node}") + (f" of {self.reward}" if self.reward else "")
        who = f"step {self.step}, sample {self.sample}, prompt {prompts[self.prompt]!r:.100}"
        return f"{self.what}{where} is not finite: {who}"


@dataclass(frozen=True)
class Item:
    """One micro-batch of fixed composition. It determines its `Rollout` bit for bit, whichever process executes it.

    prompt_ids, samples: one entry per row; `samples` are global sample indices within the step and key the noise.
    plans: one per row; empty for an evaluation, which needs only the finished latents. times: per row, the nodes at
    whose noise the finished sample is noised again for terms without gradient (see `surrogate.nft`); empty without any.
    """

    purpose: str  # "train" or the name of an evaluation; not part of any random stream's key
    step: int
    index: int
    prompt_ids: tuple[int, ...]
    samples: tuple[int, ...]
    plans: tuple[Plan, ...]
    seed: int
    num_steps: int
    guidance: float
    version: Version
    times: tuple[tuple[int, ...], ...] = ()

    @property
    def rows(self) -> int:
        return len(self.prompt_ids)


@dataclass(frozen=True)
class Rollout:
    """The part of a rollout that a learner needs: states [R, ...], sample-major, in the order of `gather_states`.

    velocities: with the drift meter on, the cached velocities at those states, to compare the learner's with.
    base: with a base penalty, the base model's velocities at those states; without any state, at the noised samples.
    finished, old: with `item.times`, the samples x0 [rows, ...], and the velocities of the policy that drew them at the
    noised samples [rows · times, ...], sample-major.
    """

    item: Item
    states: Packed
    velocities: Packed | None = None
    base: Packed | None = None
    finished: Packed | None = None
    old: Packed | None = None


@dataclass(frozen=True)
class RolloutReport:
    """The small part of a rollout, which the driver reads. omega, residuals and kept have one entry per row.

    kept: False for a row beyond its plan's `max_distance` and for a row with a fault.
    item_bytes: of the pickled item. state_bytes, velocity_bytes, base_bytes, target_bytes, forward_bytes: of what the
    sampler returns: states, drift meter's and base's velocities, targets, and what terms without gradient need.
    weight_bytes, embedding_bytes: received by the sampler since its last report. Embeddings come once, not per item.
    fingerprint: of the weights that the sampler held (see `flowbp_ray.weights.fingerprint`).
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
    forward_bytes: int = 0


@dataclass(frozen=True)
class Scored:
    """Scores of one item. scores[name] is [rows][branches]; clipped[name] is the share of rows without gradient.

    gram: per row, [terms][terms]: the inner products of the terms' gradients at the images (`rewards.balance`).
    The cotangent of a row with a fault is zero. With `rewards.balance` there is one per term: [terms, rows, ...].
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
class ScoredItem:
    """A training item that has been rolled out and scored: its reports, and the tensors that a learner needs.

    rollout, cotangent, pictures: a `Rollout`, a `Packed` and [rows, H, W, 3] uint8, or Ray references to them.
    pictures is None unless the run has a gate.
    """

    item: Item
    report: RolloutReport
    result: Scored
    rollout: Any = None
    cotangent: Any = None
    pictures: Any = None


@dataclass(frozen=True)
class Evaluated:
    """Held-out scores (name -> one float per row) and pictures [rows, H, W, 3] uint8 of an evaluation item.

    drawn: per row, whether its latent was finite. If not, its scores are NaN and its picture is decoded from zeros.
    """

    index: int
    scores: Mapping[str, tuple[float, ...]]
    drawn: tuple[bool, ...]
    images: np.ndarray
    seconds: float


@dataclass(frozen=True)
class StepReport:
    """Metrics of one optimizer step on one rank.

    grad_norm: global, before clipping; if it is not finite, nothing was updated. drift: per row, with the drift meter.
    base_distance: per row, with a base penalty: the mean squared difference from the base model's velocities.
    forward_loss, old_distance, signal: per row, with terms without gradient: see `ForwardSweep.per_sample`.
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
    base_distance: tuple[float, ...] = ()
    faults: tuple[Fault, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    forward_loss: tuple[float, ...] = ()
    old_distance: tuple[float, ...] = ()
    signal: tuple[float, ...] = ()


@dataclass(frozen=True)
class Optimality:
    """What the terms without gradient say of a learner rank's rows, for the loss of `surrogate.nft`.

    rows: r in [0, 1], the mean over the terms by their weights; NaN for a row that teaches nothing and is left out.
    weight: the sum of the terms' weights. slots: rows that every rank computes, those that only pad included.
    """

    rows: tuple[float, ...]
    weight: float
    slots: int


@dataclass(frozen=True)
class Encoded:
    """A report on encoding the prompts. found (in the cache) and encoded count texts, including the empty prompt.

    nbytes: of all these embeddings, in memory. broken: broken cache files, which were written again.
    folder: the cache's, or None without a cache.
    """

    found: int
    encoded: int
    nbytes: int
    broken: tuple[Path, ...] = ()
    folder: Path | None = None

    def describe(self) -> str:
        """One line, for the log."""
        again = f" ({len(self.broken)} of them in place of a broken file)" if self.broken else ""
        where = "no cache" if self.folder is None else f"cache {self.folder}"
        texts = f"{self.found + self.encoded} distinct prompts, {format_bytes(self.nbytes, 'MiB')}"
        return f"{texts}: {self.found} were there, {self.encoded} encoded{again}; {where}"


@dataclass(frozen=True)
class EncodedPart:
    """A report on one call of the encoder. encoded: on all texts so far. nbytes, seconds: of this call's texts.

    node: the encoder's node, by Ray's id; its disk has the cache.
    """

    encoded: Encoded
    nbytes: int
    seconds: float
    node: str = ""
