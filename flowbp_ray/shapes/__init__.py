"""The embedded domain: a compositional world with an exact verifier, and its models as package data.

Everything here except `text` works without torch.
"""

from flowbp_ray.shapes.sampling import sample, sample_prompt, sample_scene
from flowbp_ray.shapes.world import SKILLS, Claim, Part, Prompt, Scene, Thing

from .combinations import COLOURS, SHAPES
from .prompts import load_prompts, model_dir, prompt_file
from .render import render
from .verifier import colour_entropy, read, satisfies, verify

__all__ = [
    "COLOURS",
    "SHAPES",
    "SKILLS",
    "Claim",
    "Part",
    "Prompt",
    "Scene",
    "Thing",
    "colour_entropy",
    "load_prompts",
    "model_dir",
    "prompt_file",
    "read",
    "render",
    "sample",
    "sample_prompt",
    "sample_scene",
    "satisfies",
    "verify",
]
