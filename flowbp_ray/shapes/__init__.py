"""The embedded domain: a compositional world with an exact verifier, and its models as package data.

Everything here except `text` works without torch.
"""

from flowbp_ray.shapes.sampling import sample, sample_prompt, sample_scene
from flowbp_ray.shapes.world import SKILLS, Claim, Part, Prompt, Scene, Thing

from .combinations import COLOURS, SHAPES
from .look import CLEAN, Look, sample_look
from .meter import Quality, quality
from .prompts import load_prompts, model_dir, prompt_file
from .render import render
from .verifier import colour_entropy, read, satisfies, verify

__all__ = [
    "CLEAN",
    "COLOURS",
    "SHAPES",
    "SKILLS",
    "Claim",
    "Look",
    "Part",
    "Prompt",
    "Quality",
    "Scene",
    "Thing",
    "colour_entropy",
    "load_prompts",
    "model_dir",
    "prompt_file",
    "quality",
    "read",
    "render",
    "sample",
    "sample_look",
    "sample_prompt",
    "sample_scene",
    "satisfies",
    "verify",
]
