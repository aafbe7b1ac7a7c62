"""Read the recorded cases, and call the three diffusers transformers as their pipelines do."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor

from flowbp_ray.surrogate import (
    METHODS,
    AdamsBashforth,
    Cache,
    Draw,
    Lagrange,
    Method,
    Similarity,
    Supports,
    Uniform,
    renoise,
)
from flowbp_ray.trajectory import rollout

FOLDER = Path(__file__).parent.parent / "data" / "golden"
CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors") if ".model" not in path.name)
# The tail ratio is not among the recorded hyper-parameters; the recorded factor of this case fits these six nodes only.
TAILS = {"flux2-flowbp_sparse-2": 0.5}
SCHEMES = {"lagrange": Lagrange, "uniform": Uniform, "adams_bashforth": AdamsBashforth}


def _read(name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(FOLDER / name, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@dataclass(frozen=True)
class Golden:
    """One recorded case: its metadata, its tensors, and the model they were recorded with."""

    name: str
    case: dict[str, Any]
    tensors: dict[str, Tensor]
    model: torch.nn.Module

    @staticmethod
    def load(name: str) -> Golden:
        metadata, tensors = _read(f"{name}.safetensors")
        case = json.loads(metadata["case"])
        head, weights = _read(case["model_file"])
        model = getattr(diffusers, head["class_name"])(**json.loads(head["config"])).eval()
        model.load_state_dict(weights)
        return Golden(name, case, tensors, model)

    def call(self, x: Tensor, node: Tensor, row: Tensor, negative: bool = False) -> Tensor:
        """One branch of the transformer at rows of the batch."""
        prefix = "cond.negative_" if negative else "cond."
        embeds = self.tensors[f"{prefix}prompt_embeds"].expand(2, -1, -1)[row]
        t = self.tensors["timesteps"][node]
        if self.case["backbone"] == "sd35":
            pooled = self.tensors[f"{prefix}pooled_prompt_embeds"][row]
            return self.model(
                x, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=t, return_dict=False
            )[0]
        kwargs: dict[str, Any] = {"encoder_hidden_states": embeds, "timestep": t / 1000, "return_dict": False}
        grid, zero = torch.arange(4), torch.arange(1)
        if self.case["backbone"] == "flux1":
            kwargs |= {"img_ids": torch.cartesian_prod(zero, grid, grid).float(), "txt_ids": torch.zeros(5, 3)}
            kwargs |= {"pooled_projections": self.tensors["cond.pooled_prompt_embeds"][row]}
            return self.model(x, guidance=torch.full((len(x),), self.case["guidance_scale"]), **kwargs)[0]
        kwargs["img_ids"] = torch.cartesian_prod(zero, grid, grid, zero).expand(len(x), -1, -1)
        kwargs["txt_ids"] = torch.cartesian_prod(zero, zero, zero, torch.arange(5)).expand(len(x), -1, -1)
        return self.model(x, guidance=None, **kwargs)[0]

    def velocity(self, x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        """v with guidance; a detached negative branch carries no gradient."""
        positive = self.call(x, node, row)
        if self.case["backbone"] == "flux1":
            return positive
        g = self.case["guidance_scale"]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.case["cfg_detach_negative"]):
            negative = self.call(x, node, row, negative=True)
        return negative + g * (positive - negative)

    def learner_velocity(self, x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        """What a learner runs: g·v_cond alone where the negative branch is detached."""
        if self.case["backbone"] == "flux1" or not self.case["cfg_detach_negative"]:
            return self.velocity(x, node, row)
        return self.case["guidance_scale"] * self.call(x, node, row)

    @cached_property
    def cache(self) -> Cache:
        """The recorded rollout, with the fresh states of DRaFT-LV made by the library."""
        t = self.tensors
        cache = Cache(t["sigmas"], t["latents"], t["velocities"])
        if "renoise" not in t:
            return cache
        y, last = renoise(cache, t["renoise"]), torch.full((2,), cache.num_steps - 1)
        with torch.no_grad():
            v_y = torch.stack([self.velocity(state, last, torch.arange(2)) for state in y])
        return replace(cache, y=y, v_y=v_y)

    def rollout(self) -> Tensor:
        """The latents [N+1, B, …] that the library's rollout reaches from the recorded noise."""
        return rollout(self.velocity, self.tensors["latents"][0], self.tensors["sigmas"]).x

    def loss(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(rewards, relu(clip − r)) of targets [B, branches, …], both [branches·B] in the order of the file."""
        flat = target.transpose(0, 1).flatten(0, 1).flatten(1)
        rewards = torch.tanh(flat @ self.tensors["reward_projection"] / 8) + 0.05 * (flat**2).mean(1)
        return rewards, torch.relu(self.case["loss_clip"] - rewards)

    @property
    def method(self) -> Method:
        """The recorded hyper-parameters, as the method they were recorded with."""
        h, name = self.case["hyperparameters"], self.case["method"]
        sparse = [h.get(f"flowbp_sparse_{key}") for key in ("num_active_steps", "late_bias", "grad_rescale")]
        if name == "refl":
            return METHODS[name](h["refl_last_n_steps"])
        if name == "draft_lv":
            return METHODS[name](h["draft_lv_num_noised_samples"])
        if name == "drtune":
            return METHODS[name](h["drtune_num_train_steps"], h["drtune_early_stop_ratio"])
        if name == "leapalign":
            return METHODS[name](h["alpha"], h["tau"])
        if name == "flowbp_sparse":
            return METHODS[name](*sparse, tail=TAILS.get(self.name, 1.0))
        if name == "flowbp_bridge":
            return METHODS[name](*sparse, alpha=h["alpha"])
        order, mode, scale, most, rescale, scheme, anchor = [
            h[f"flowbp_lagrange_{key}"]
            for key in (
                "connector_order",
                "grad_support_mode",
                "grad_support_scale",
                "max_active_supports",
                "grad_rescale",
                "weight_scheme",
                "anchor_lambda",
            )
        ]
        return replace(
            METHODS[name](),
            active=Supports(order, mode, most, scale),
            weights=SCHEMES[scheme](anchor),
            coupling=h["alpha"],
            rescale=rescale,
            similarity=Similarity(h["tau"]),
        )

    @property
    def draw(self) -> Draw:
        """The recorded nodes."""
        drawn = self.case["drawn"]
        end = drawn.get("selected_idx", drawn.get("early_stop_idx"))
        nodes = next(
            (drawn[key] for key in ("train_indices", "active_indices", "selected_indices") if key in drawn),
            [end] if "selected_idx" in drawn else [drawn["final_idx"]] if "final_idx" in drawn else [],
        )
        return Draw(end, drawn.get("k_idx"), drawn.get("j_idx"), tuple(nodes))
