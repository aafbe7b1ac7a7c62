"""An SD3-like transformer of 14 M random weights with a cached rollout, for measuring learners without a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from flowbp_ray.schedule import static_shift
from flowbp_ray.streams import stream
from flowbp_ray.surrogate import METHODS, Cache, Plan, gather_states
from flowbp_ray.trajectory import rollout

STEPS, GUIDANCE, WORDS, WIDTH = 25, 4.5, 32, 256
LATENT = (16, 16, 16)


def sd3_like() -> SD3Transformer2DModel:
    """14 M parameters: 6 layers, width 256, 64 image and 32 text tokens."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=64,
        joint_attention_dim=WIDTH,
        caption_projection_dim=256,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=16,
    )


@dataclass(frozen=True)
class Problem:
    """A model, its conditioning, a rollout and plans: what one optimizer step of a learner is given."""

    model: SD3Transformer2DModel
    cond: tuple[Tensor, Tensor]
    negative: tuple[Tensor, Tensor]
    cache: Cache
    plans: list[Plan]
    states: Tensor
    cotangents: Tensor

    def predict(self, x: Tensor, node: Tensor, row: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        return self.model(
            hidden_states=x,
            encoder_hidden_states=text[0][row],
            pooled_projections=text[1][row],
            timestep=self.cache.sigmas[node] * 1000,
        ).sample

    def conditional(self, x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        """What a learner of ours runs: g · v_cond. The negative branch is detached, so it has no gradient."""
        return GUIDANCE * self.predict(x, node, row, self.cond)

    def guided(self, x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        """What a K-graph needs: the value of the guided velocity, so the negative forward too, without gradient."""
        v = self.predict(x, node, row, self.cond)
        with torch.no_grad():
            negative = self.predict(x, node, row, self.negative)
        return negative + GUIDANCE * (v - negative)


def problem(k: int, rows: int = 2, method: str = "flowbp_sparse") -> Problem:
    """A step of `method` with k active nodes on `rows` samples; everything is seeded."""
    model = sd3_like()
    generator = torch.Generator().manual_seed(1)

    def text() -> tuple[Tensor, Tensor]:
        return torch.randn(rows, WORDS, WIDTH, generator=generator), torch.randn(rows, WIDTH, generator=generator)

    cond, negative = text(), text()
    sigmas = static_shift(STEPS, 3.0)
    empty = Cache(sigmas, torch.empty(0), torch.empty(0))
    draft = Problem(model, cond, negative, empty, [], torch.empty(0), torch.empty(0))
    path = rollout(draft.guided, torch.randn(rows, *LATENT, generator=generator), sigmas)
    cache = Cache(sigmas, path.x, path.v)
    plans = [METHODS[method](k=k).plan(sigmas, stream(0, "plan", 0))] * rows
    pull = torch.randn(rows, 1, *LATENT, generator=generator) / rows
    return Problem(model, cond, negative, cache, plans, gather_states(plans, cache), pull)


class SavedBytes:
    """Bytes that live graphs hold for backward, and their peak (saved-tensor hooks; each storage counts once)."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.holders: dict[int, int] = {}

    def measure(self, work: Callable[[], object]) -> int:
        """The peak while `work` runs, parameters that graphs hold included."""
        meter = self

        class Box:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
                if meter.holders.setdefault(self.key, 0) == 0:
                    meter.live += tensor.untyped_storage().nbytes()
                meter.holders[self.key] += 1
                meter.peak = max(meter.peak, meter.live)

            def __del__(self) -> None:
                meter.holders[self.key] -= 1
                if meter.holders[self.key] == 0:
                    meter.live -= self.tensor.untyped_storage().nbytes()

        with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
            work()
        return self.peak
