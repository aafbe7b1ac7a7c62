"""HPSv2.1, human preference between images of one prompt: cos(image, text) of a tuned CLIP ViT-H/14.

Human Preference Score v2 (Wu et al., arXiv 2306.09341) and its released scorer, github.com/tgxs002/HPSv2.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flowbp_ray.rewards.embedding import Embedder, tower_dtype
from flowbp_ray.rewards.files import check_file, check_fit, check_values, fill, read_checkpoint, shapes_of
from flowbp_ray.rewards.preprocess import padded_pixels
from flowbp_ray.rewards.skeleton import VIT_H_14, Skeleton, clip_skeleton
from flowbp_ray.utils.errors import nearest, need_package

WHAT = "HPSv2.1's checkpoint HPS_v2.1_compressed.pt, from xswu/HPSv2 on Hugging Face"


class HPSv2:
    """r = cos(image features, text features) (arXiv 2306.09341, without the temperature); about 0.2 to 0.4.

    Images are seen whole: longest side to 224, black around it. Needs open-clip-torch, which has the architecture and
    its tokenizer. `architecture` is the name of one of its model configurations.
    """

    name = "hpsv2"

    def __init__(
        self,
        path: str | Path | None = None,
        architecture: str = "ViT-H-14",
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        """Load the checkpoint at `path` ({"state_dict": ...}); raises ValueError where it is not one."""
        self.check(path, architecture, dtype)
        import open_clip

        model = _model(architecture)
        file, kind = check_file(self.name, "path", path, WHAT), tower_dtype(self.name, dtype)
        fill(model, _state(file), self.name, file, WHAT)
        model.to(device, kind).eval().requires_grad_(False)
        tokenize, size = open_clip.get_tokenizer(architecture), model.visual.image_size[0]

        def read(text: str) -> Tensor:
            return model.encode_text(tokenize([text]).to(device))[0]

        pixels = partial(padded_pixels, size=size)
        self.towers = Embedder(self.name, device, kind, pixels, model.encode_image, read)

    @staticmethod
    def check(path: str | Path | None, architecture: str, dtype: str) -> None:
        """Raise ValueError for what `HPSv2(...)` would refuse: misfits, and values that are not finite."""
        file = check_file("hpsv2", "path", path, WHAT)
        tower_dtype("hpsv2", dtype)
        need_package("reward 'hpsv2'", "open-clip-torch", "hps")
        state, hollow = _state(file), _model(architecture, device="meta")
        check_fit("hpsv2", file, shapes_of(state), shapes_of(hollow.state_dict()), WHAT)
        check_values("hpsv2", file, state.items)

    @staticmethod
    def skeleton(architecture: str, dtype: str) -> Skeleton | None:
        """The ViT-H/14 of transformers, which has the sizes of open_clip's; None for another architecture."""
        return clip_skeleton(None, VIT_H_14, dtype) if architecture == "ViT-H-14" else None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine [B] of images [B, 3, H, W] in 0..1 (any H, W) with B prompts; differentiable in the images."""
        return self.towers.cosine(images, prompts)


def _model(architecture: str, **options: Any) -> Any:
    """open_clip's model without its weights; raises ValueError where it has none of that name."""
    # Not at the top: it takes seconds, and `check` must answer where it is not installed.
    import open_clip

    if architecture not in open_clip.list_models():
        raise ValueError(f"reward 'hpsv2': {nearest(architecture, open_clip.list_models(), 'options.architecture')}")
    logging.disable(logging.WARNING)  # that the weights are random, which they do not stay
    try:
        return open_clip.create_model(architecture, load_weights=False, **options)
    finally:
        logging.disable(logging.NOTSET)


def _state(file: Path) -> dict[str, Any]:
    """The model's tensors in a checkpoint of training."""
    state = read_checkpoint("hpsv2", file, WHAT).get("state_dict")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"reward 'hpsv2': {file} has no 'state_dict' of tensors; it should be {WHAT}")
    return state
