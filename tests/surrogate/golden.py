"""Read the recorded cases, and call their transformers through the backbone classes."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor

from flowbp_ray.backbones import Backbone, Conditioning, tokens
from flowbp_ray.backbones.guidance import full_velocity, trained_velocity
from flowbp_ray.backbones.registry import backbone_named
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
from flowbp_ray.surrogate.trajectory import rollout
from tests.paths import DATA

FOLDER = DATA / "golden"
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
    backbone: Backbone
    model: torch.nn.Module

    @staticmethod
    def load(name: str) -> Golden:
        metadata, tensors = _read(f"{name}.safetensors")
        case = json.loads(metadata["case"])
        head, weights = _read(case["model_file"])
        recorded = getattr(diffusers, head["class_name"])(**json.loads(head["config"]))
        recorded.load_state_dict(weights)
        with tempfile.TemporaryDirectory() as folder:
            recorded.save_pretrained(Path(folder) / "transformer")
            backbone = backbone_named(case["backbone"], folder)
            model = backbone.load_transformer(torch.float32)
        if case["backbone"] != "sd35":  # recorded packed [..., 16, C]; our states are [..., C, 4, 4]
            for key in {"latents", "velocities", "renoise", "target"} & tensors.keys():
                lead, flat = tensors[key].shape[:-2], tensors[key].flatten(0, -3)
                tensors[key] = tokens.unflatten(flat, 4, 4).unflatten(0, lead)
        return Golden(name, case, tensors, backbone, model)

    def conditioning(self, negative: bool = False) -> Conditioning:
        """The recorded embeddings of both rows; FLUX.1 has no negative ones."""
        names = ("prompt_embeds", "pooled_prompt_embeds")
        prefix = "cond.negative_" if negative else "cond."
        found = {name: self.tensors[prefix + name] for name in names if prefix + name in self.tensors}
        return {name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in found.items()}

    def bind(self, function: Any, **keywords: Any) -> Any:
        """`full_velocity` or `trained_velocity` of the library at the recorded case."""
        cond, negative = self.conditioning(), self.conditioning(negative=True)
        g = self.case["guidance_scale"]
        return function(self.backbone, self.model, self.tensors["sigmas"], cond, negative, g, **keywords)

    def velocity(self, x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        """v with guidance; a detached negative branch carries no gradient."""
        if self.backbone.embedded_guidance or not self.case["cfg_detach_negative"]:
            return self.bind(full_velocity)(x, node, row)
        sigma, cond, negative = self.tensors["sigmas"][node], self.conditioning(), self.conditioning(negative=True)
        with torch.no_grad():
            v_neg = self.backbone.predict(self.model, x, sigma, {name: t[row] for name, t in negative.items()})
        v_cond = self.backbone.predict(self.model, x, sigma, {name: t[row] for name, t in cond.items()})
        return self.backbone.guide(v_cond, v_neg, self.case["guidance_scale"])

    def learner_velocity(self, x: Tensor, node: Tensor, row: Tensor) -> Tensor:
        """What a learner runs: g·v_cond alone where the negative branch is detached."""
        return self.bind(trained_velocity, detach_negative=self.case["cfg_detach_negative"])(x, node, row)

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
        return rollout(self.bind(full_velocity), self.tensors["latents"][0], self.tensors["sigmas"]).x

    def loss(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(rewards, relu(clip − r)) of targets [B, branches, …], both [branches·B] in the order of the file."""
        rows = target.transpose(0, 1).flatten(0, 1)
        flat = (rows if self.case["backbone"] == "sd35" else tokens.flatten(rows)).flatten(1)
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
