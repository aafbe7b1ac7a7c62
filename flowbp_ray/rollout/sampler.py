"""The sampler as a plain object, without Ray: a transformer without optimizer state, and the version of its weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from flowbp_ray.backbones.embeddings import Embeddings
from flowbp_ray.backbones.frozen import load_base
from flowbp_ray.backbones.guidance import forward_guidance, full_velocity, held_velocity
from flowbp_ray.backbones.kernels import use_kernels
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.config.learners import LoraConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.config.sections import BackboneConfig
from flowbp_ray.messages import Item, Packed, Rollout, RolloutReport, Version
from flowbp_ray.rollout.execute import VelocityRecorder, finish_item, run_item
from flowbp_ray.rollout.held import FetchParts, HeldParts, Key
from flowbp_ray.rollout.items import noise_of
from flowbp_ray.rollout.parts import Result, joined, split
from flowbp_ray.surrogate.trajectory import Velocity
from flowbp_ray.utils.digest import digest
from flowbp_ray.utils.tracing import span
from flowbp_ray.weights import trainable
from flowbp_ray.weights.broadcast import limits
from flowbp_ray.weights.fingerprint import fingerprint
from flowbp_ray.weights.inbox import Inbox
from flowbp_ray.weights.packing import PackedTensors, Receiver

FetchWeights = Callable[[], Sequence[PackedTensors]]


class Sampler:
    """Rolls out items with exactly the version of the weights that they name."""

    def __init__(
        self,
        backbone: BackboneConfig,
        *,
        lora: LoraConfig | None = None,
        seed: int = 0,
        device: str = "cpu",
        drift_meter: bool = False,
        base_velocities: bool = False,
        base_guidance: float | None = None,
        embeddings: Embeddings | None = None,
        base: nn.Module | None = None,
        micro_batch: int | None = None,
    ) -> None:
        """lora, seed: which weights are trained, and the adapters' initialisation; see `trainable.prepare`.

        drift_meter: return the velocities that the drift is measured with. base_velocities: return the base model's
        velocities at the active states; without adapters this needs a second copy of the weights. base_guidance: the
        guidance of these; None: that of the velocity which is learned. embeddings: may be set later, but before the
        first item. base: a loaded base on `device`, whose tensors are used and not changed. micro_batch: rows of a
        training item that are computed at a time; None: all.
        """
        self.config, self.device, self.embeddings = backbone, device, embeddings
        self.parts, self.micro_batch = HeldParts(), micro_batch
        self.drift_meter, self.base_velocities, self.base_guidance = drift_meter, base_velocities, base_guidance
        self.backbone = build_backbone(backbone)
        self.latent_shape = self.backbone.latent_shape(backbone.height, backbone.width)
        self.transformer = load_base(self.backbone, backbone, device, base)
        trainable.prepare(self.transformer, lora, seed, self.backbone.lora_targets)
        self.transformer.to(device)
        use_kernels(self.transformer, backbone.compile, backbone.attention)
        self.receiver = Receiver(self.transformer)
        self.frozen: nn.Module | None = None  # the base model, if there are no adapters that could be turned off
        if base_velocities and lora is None:
            frozen = self.backbone.load_transformer(backbone.torch_dtype).requires_grad_(False)
            self.frozen = frozen.to(device)
            use_kernels(self.frozen, backbone.compile, backbone.attention)
        self.inbox: Inbox | None = None  # where versions arrive by broadcast
        self.busy = threading.Lock()  # held while an item uses the weights, if there is an inbox
        self.version: Version | None = None
        self.fingerprint = ""
        self.weight_bytes = self.embedding_bytes = 0  # received since the last report

    def hold(self, parts: Sequence[Key], fetch: FetchParts) -> None:
        """Set the embeddings of the next item to those of `parts`; fetch the ones that are not held any more."""
        self.embeddings, nbytes = self.parts.take(parts, fetch)
        self.embedding_bytes += nbytes

    def ensure_version(self, version: Version, fetch: FetchWeights) -> float:
        """Make `version` the current weights; fetch it only if another one is held. Returns the seconds it took.

        No tensor at all stands for the weights that the sampler was built with, of which there is only one version.
        """
        if self.version == version:
            return 0.0
        started = time.perf_counter()
        self.version = None  # an installation that fails halfway leaves no valid version
        with span("load weights"):
            if self.inbox is None or not self.inbox.install(version):
                packed = fetch()
                if self.inbox is not None:
                    self.inbox.forget()
                if packed:
                    self.receiver.install(packed)
            self.weight_bytes += self.receiver.nbytes
            self.version, self.fingerprint = version, self.current()
        return time.perf_counter() - started

    def open_inbox(self, address: str, port: int, seat: str, spare: int, timeout: float) -> None:
        """Receive broadcast versions from the sender at address:port, in the place of an earlier one; see `Inbox`.

        timeout: seconds after which the run gives up a process that does not answer.
        """
        if self.inbox is not None:
            self.inbox.close()
        with self.busy:
            blocks, _ = self.receiver.lay_out()
        self.inbox = Inbox(
            self.receiver, address, port, seat, self.busy, spare, self._overwritten, *limits(blocks, timeout)
        )

    def _overwritten(self) -> None:
        self.version = None

    def rollout(self, item: Item, fetch: FetchWeights) -> tuple[RolloutReport, Rollout, Packed]:
        """Roll out a training item; return the report, the learner's part and the targets [rows, branches, ...]."""
        load_seconds = self.ensure_version(item.version, fetch)
        with span("rollout"):
            parts = [self._rollout(part) for part in split(item, self.micro_batch)]
        report, kept, target = joined(item, parts)
        report = replace(report, weight_bytes=self.weight_bytes, embedding_bytes=self.embedding_bytes)
        self.weight_bytes = self.embedding_bytes = 0
        return replace(report, load_seconds=load_seconds, fingerprint=self.fingerprint), kept, target

    def _rollout(self, item: Item) -> Result:
        recorder = VelocityRecorder() if self.drift_meter else None
        velocity, sigmas = self._velocity(item, recorder)
        base = self._base_velocity(item, sigmas) if self.base_velocities else None
        forward = self._forward_velocity(item, sigmas) if item.times else None
        return run_item(item, velocity, sigmas, self._noise(item), recorder, base, forward)

    def sample(self, item: Item, fetch: FetchWeights) -> Packed:
        """Roll out an evaluation item; return the finished latents [rows, ...]."""
        self.ensure_version(item.version, fetch)
        velocity, sigmas = self._velocity(item)
        with span("rollout"):
            return finish_item(velocity, sigmas, self._noise(item))

    def current(self) -> str:
        """The fingerprint of the trained weights that this sampler holds."""
        return fingerprint(trainable.trained(self.transformer))

    def digest(self) -> str:
        """sha256 of the trained weights that this sampler holds."""
        return digest(trainable.trained(self.transformer))

    def _noise(self, item: Item) -> Tensor:
        """x[0] [rows, ...] in the model's dtype, on the transformer's device."""
        return noise_of(item, self.latent_shape).to(self.device, self.config.torch_dtype)

    def _velocity(self, item: Item, observe: Callable[[Tensor], None] | None = None) -> tuple[Velocity, Tensor]:
        model = self.config
        assert self.embeddings is not None
        sigmas = self.backbone.sigmas(item.num_steps, model.height, model.width)
        velocity = full_velocity(
            self.backbone,
            self.transformer,
            sigmas,
            self.embeddings.rows(item.prompt_ids),
            self.embeddings.negative(item.rows),
            item.guidance,
            observe,
        )
        return velocity, sigmas

    def _forward_velocity(self, item: Item, sigmas: Tensor) -> Velocity:
        """The velocity that terms without gradient learn: of the conditional branch alone."""
        assert self.embeddings is not None
        rows, guidance = self.embeddings.rows(item.prompt_ids), forward_guidance(self.backbone, item.guidance)
        return full_velocity(self.backbone, self.transformer, sigmas, rows, {}, guidance)

    def _base_velocity(self, item: Item, sigmas: Tensor) -> Velocity:
        """What a penalty holds a learner's velocity to: that of the frozen copy, or with adapters off."""
        assert self.embeddings is not None
        surrogate = any(plan.states for plan in item.plans)
        learned = item.guidance if surrogate else forward_guidance(self.backbone, item.guidance)
        velocity = held_velocity(
            self.backbone,
            self.transformer if self.frozen is None else self.frozen,
            sigmas,
            self.embeddings.rows(item.prompt_ids),
            self.embeddings.negative(item.rows),
            learned,
            self.config.detach_negative,
            learned if self.base_guidance is None else self.base_guidance,
        )
        if self.frozen is not None:
            return velocity

        def without_adapters(x: Tensor, node: Tensor, row: Tensor) -> Tensor:
            with trainable.adapters_off(self.transformer):
                return velocity(x, node, row)

        return without_adapters


def build_sampler(config: RunConfig, embeddings: Embeddings | None = None, base: nn.Module | None = None) -> Sampler:
    """Build a sampler of a run in this process. base: see `Sampler`."""
    learners, penalty = config.learners, config.learners.base_penalty
    return Sampler(
        config.backbone,
        lora=learners.lora,
        seed=config.seed,
        device=config.samplers.device,
        drift_meter=config.drift.on,
        base_velocities=penalty is not None,
        base_guidance=None if penalty is None else penalty.guidance,
        embeddings=embeddings,
        base=base,
        micro_batch=config.data.rollout_micro_batch,
    )
