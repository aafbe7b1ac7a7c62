"""Emulated actors: they wait as long as a device would compute, and send messages of the true size.

They have the methods of the real actors but do not import torch, so dozens of them fit in the memory of a small
machine. The driver, the placement, Ray's transfers and the retries after failures are real.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray

from flowbp_ray.benching.emulation import Emulation, Wait
from flowbp_ray.messages import (
    Encoded,
    EncodedPart,
    Evaluated,
    Item,
    Optimality,
    Packed,
    Rollout,
    RolloutReport,
    Scored,
    StepReport,
    Version,
)
from flowbp_ray.utils.checksums import TensorChecksum, combine

DTYPES = {2: ("uint16", "bfloat16"), 4: ("float32", "float32")}


class Process:
    """The base class of the emulated actors."""

    given: Emulation

    def __init__(self, emulation: Emulation | None = None) -> None:
        """emulation: None for a learner, which gets it in `build`."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if emulation is not None:
            self.given = emulation

    def ready(self) -> str:
        return socket.gethostname()

    def pid(self) -> int:
        return os.getpid()

    def modules(self) -> list[str]:
        """The names of the imported modules; a test checks that torch is not among them."""
        return sorted(sys.modules)


class EmulatedEncoder(Process):
    """An encoder that answers at once."""

    def add(self, texts: Sequence[str], ids: Sequence[tuple[int, ...]]) -> tuple[EncodedPart, Packed]:
        part = Packed(np.ones(self.given.prompt_bytes * len(texts), np.uint8), "uint8")
        return EncodedPart(Encoded(0, len(texts), part.nbytes), part.nbytes, 0.0), part

    def fill(self, texts: Sequence[str]) -> EncodedPart:
        nbytes = self.given.prompt_bytes * len(texts)
        return EncodedPart(Encoded(0, len(texts), nbytes), nbytes, 0.0)


class EmulatedSampler(Process):
    """A sampler that waits for loading a version and for each item; it keeps only the version, not the weights."""

    def __init__(self, emulation: Emulation) -> None:
        super().__init__(emulation)
        self.version: Version | None = None
        self.fingerprint = ""
        self.held: set[bytes] = set()  # the parts of the embeddings that were fetched
        self.weight_bytes = self.embedding_bytes = 0  # received since the last report

    def rollout(
        self, item: Item, weights: Sequence[Any], embeddings: Sequence[Any]
    ) -> tuple[RolloutReport, Rollout, Packed]:
        load_seconds = self._require(item.version, weights, embeddings)
        wait, given = Wait(), self.given
        states = packed((sum(len(plan.states) for plan in item.plans), *given.latent), given.itemsize)
        target = packed((item.rows, len(item.plans[0].branches), *given.latent), given.itemsize)
        noised = sum(len(nodes) for nodes in item.times)
        finished, old = (packed((n, *given.latent), given.itemsize) if noised else None for n in (item.rows, noised))
        velocities = states if given.drift else None
        base_velocities = (states if len(states.array) else old) if given.base else None
        item_bytes = len(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
        seconds = wait.until(given.sampler_s * item.rows)
        report = RolloutReport(
            step=item.step,
            index=item.index,
            version=item.version,
            omega=(1.0,) * item.rows,
            residuals=((0.0, 0.0),) * item.rows,
            kept=(True,) * item.rows,
            item_bytes=item_bytes,
            state_bytes=states.nbytes,
            velocity_bytes=velocities.nbytes if velocities else 0,
            base_bytes=base_velocities.nbytes if base_velocities else 0,
            target_bytes=target.nbytes,
            seconds=seconds,
            load_seconds=load_seconds,
            weight_bytes=self.weight_bytes,
            embedding_bytes=self.embedding_bytes,
            fingerprint=self.fingerprint,
            forward_bytes=finished.nbytes + old.nbytes if finished and old else 0,
        )
        self.weight_bytes = self.embedding_bytes = 0
        return report, Rollout(item, states, velocities, base_velocities, finished, old), target

    def sample(self, item: Item, weights: Sequence[Any], embeddings: Sequence[Any]) -> tuple[str, Packed]:
        self._require(item.version, weights, embeddings)
        Wait().until(self.given.sampler_s * item.rows)
        return self.fingerprint, packed((item.rows, *self.given.latent), self.given.itemsize)

    def digest(self) -> str:
        return self.fingerprint

    def _require(self, version: Version, weights: Sequence[Any], embeddings: Sequence[Any]) -> float:
        """Fetch new embeddings, and the weights if another version is held; wait as long as loading would take."""
        new = [ref for ref in embeddings if ref.binary() not in self.held]
        self.embedding_bytes += sum(part.nbytes for part in ray.get(new)) if new else 0
        self.held.update(ref.binary() for ref in new)
        if self.version == version:
            return 0.0
        wait = Wait()
        tensors: dict[str, Packed] = {n: t for part in ray.get(ray.get(weights[0])) for n, t in part.items()}
        self.weight_bytes += sum(tensor.nbytes for tensor in tensors.values())
        self.version, self.fingerprint = version, combine([parts(tensors)])
        return wait.until(self.given.load_s)


class EmulatedReward(Process):
    """A reward server that scores every image 0.5; without gradient 0 and 1 in turns, so that a prompt's differ."""

    def __init__(self, emulation: Emulation, agreed: Mapping[str, str] | None = None) -> None:
        """agreed: not used; the real actor's argument for remote reward servers."""
        super().__init__(emulation)

    def score(self, item: Item, prompts: list[str], report: RolloutReport, target: Packed) -> tuple[Scored, Packed]:
        wait, given = Wait(), self.given
        branches, terms = target.array.shape[1], len(given.rewards)
        shape: tuple[int, ...] = (*((given.copies,) if given.copies > 1 else ()), item.rows, branches, *given.latent)
        cotangent = packed(shape if given.rewards else (item.rows, 0), 4)
        scores = dict.fromkeys(given.rewards, ((0.5,) * branches,) * item.rows)
        scores |= dict.fromkeys(given.scored, tuple((float(sample % 2),) * branches for sample in item.samples))
        seconds = wait.until(given.reward_s * item.rows * branches)
        scored = Scored(
            step=item.step,
            index=item.index,
            scores=scores,
            losses=(0.5,) * item.rows,
            clipped=dict.fromkeys(given.rewards, 0.0),
            gram=(tuple(tuple(float(i == j) for j in range(terms)) for i in range(terms)),) * item.rows,
            cotangent_bytes=cotangent.nbytes,
            seconds=seconds,
        )
        return scored, cotangent

    def evaluate(self, item: Item, prompts: list[str], latents: Packed) -> Evaluated:
        seconds = Wait().until(self.given.reward_s * item.rows)
        pictures = np.zeros((item.rows, 8, 8, 3), np.uint8)
        scores = dict.fromkeys((*self.given.rewards, *self.given.scored), (0.5,) * item.rows)
        return Evaluated(item.index, scores, (True,) * item.rows, pictures, seconds)


class EmulatedLearner(Process):
    """A learner rank. Rank 0 publishes all weights as one bucket.

    The first element of the weights counts the steps, and is their checksum.
    """

    def rendezvous(self) -> tuple[str, int]:
        return ray.util.get_node_ip_address(), 0

    def build(self, emulation: Emulation, rank: int, address: str, port: int) -> str:
        self.given, self.rank, self.done = emulation, rank, 0
        self.weights = np.zeros(max(1, emulation.weight_bytes // 2), np.uint16)
        return socket.gethostname()

    def step(
        self,
        step: int,
        factors: Sequence[float],
        shares: Sequence[float],
        optimality: Optimality | None,
        *messages: Rollout | Packed,
    ) -> StepReport:
        wait, rows = Wait(), len(factors)
        rollouts = [message for message in messages if isinstance(message, Rollout)]
        self.done = step + 1
        seconds = wait.until(self.given.learner_s * rows)
        states = sum(len(rollout.states.array) for rollout in rollouts)
        drift = (0.0,) * rows if self.given.drift else ()
        moved = (0.0,) * rows if self.given.base else ()
        seen = (0.0,) * rows if optimality else ()
        return StepReport(
            step,
            self.rank,
            1.0,
            1e-5,
            states + (optimality.slots if optimality else 0),
            rows,
            0,
            seconds,
            drift,
            moved,
            forward_loss=seen,
            old_distance=seen,
            signal=seen,
        )

    def drift(self, *messages: Rollout | Packed) -> tuple[float, ...]:
        rows = sum(message.item.rows for message in messages if isinstance(message, Rollout))
        Wait().until(self.given.node_s * rows)
        return (0.0,) * rows

    def buckets(self) -> int:
        return 1

    def publish(self, ema: bool = False) -> Iterator[dict[str, Packed] | float]:
        wait = Wait()
        self.weights[0] = self.done % (1 << 16)
        yield {"weights": Packed(self.weights, "bfloat16")} if self.rank == 0 else {}
        yield wait.until(self.given.publish_s)

    def checksums(self, ema: bool = False) -> dict[str, TensorChecksum]:
        value = self.done % (1 << 16) if self.rank == 0 else 0
        return {"weights": TensorChecksum(self.weights.shape, "torch.bfloat16", value)}

    def digest(self) -> str:
        return f"emulated, {self.done} steps"

    def check_folder_visible(self, folder: str) -> None:
        pass

    def save(self, folder: str, background: bool) -> None:
        pass

    def saved(self, wait: bool) -> dict[str, str] | None:
        return {}

    def load(self, folder: str) -> None:
        pass


def packed(shape: tuple[int, ...], itemsize: int) -> Packed:
    """A tensor of zeros of the true size."""
    kind, name = DTYPES[itemsize]
    return Packed(np.zeros(shape, kind), name)


def parts(tensors: dict[str, Packed]) -> dict[str, TensorChecksum]:
    """The checksums of these weights as `EmulatedLearner.checksums` states them: the first element."""
    return {n: TensorChecksum(t.array.shape, f"torch.{t.dtype}", int(t.array[0])) for n, t in tensors.items()}


RemoteEncoder: Any = ray.remote(EmulatedEncoder)
RemoteSampler: Any = ray.remote(EmulatedSampler)
RemoteReward: Any = ray.remote(EmulatedReward)
RemoteLearner: Any = ray.remote(EmulatedLearner)
