"""ImageReward 1.0: what people prefer, learned on top of BLIP (Xu et al., arXiv 2304.05977).

    score = (mlp(h) - 0.16717) / 1.03334,   h = the text encoder's state at [CLS], having looked at the image

The text encoder reads 35 tokens of the prompt. mean and deviation are those of the authors' data, so that the scores
of ordinary samples have mean 0 and deviation 1; people prefer what scores above. The mlp is five linear layers with
nothing but dropout in between (the authors' activations are commented out), which does nothing when scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertTokenizer

from flowbp_ray.rewards.base import needed
from flowbp_ray.rewards.blip import Blip, BlipSizes
from flowbp_ray.rewards.embedding import check_pairs, tower_dtype
from flowbp_ray.rewards.files import check_finite, check_fit, check_values, read_shapes, read_tensors
from flowbp_ray.rewards.preprocess import clip_pixels
from flowbp_ray.rewards.skeleton import Skeleton, dtype_of
from flowbp_ray.utils.addresses import existing_path

NAME = "image_reward"
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
TOKENS = 35
WEIGHTS = "ImageReward.pt (1.8 GB) of THUDM/ImageReward on the Hugging Face hub"
WORDS = "a folder with the tokenizer of google-bert/bert-base-uncased (vocab.txt or tokenizer.json)"
UNUSED = (
    "blip.vision_proj.weight",  # the projections of BLIP's contrastive loss
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",  # 0, 1, 2, …: a buffer of the transformers of the time
)


PUBLISHED = BlipSizes(1024, 4096, 24, 16, 224, 768, 3072, 12, 30524, 512)


class Model(nn.Module):
    """BLIP and the head, with the published names: (pixels, ids, mask) -> scores [B]."""

    def __init__(self, sizes: BlipSizes) -> None:
        super().__init__()
        self.blip = Blip(sizes)
        self.mlp = ImageRewardHead(sizes.text_width)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """pixels [B, 3, S, S] normalised; ids [B, L]; mask [B, L] bool."""
        judged: Tensor = self.mlp(self.blip(pixels, ids, mask)[:, 0])
        return (judged - MEAN) / DEVIATION


class ImageRewardHead(nn.Module):
    """The published mlp, [B, D] -> [B], in fp32 at least; the dropouts hold its linear layers at 0, 2, 4, 6, 7."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, states: Tensor) -> Tensor:
        judged: Tensor = self.layers(states.to(torch.promote_types(states.dtype, torch.float32)))
        return judged.squeeze(-1)


class ImageReward:
    """ImageReward 1.0 (module docstring) on [B, 3, H, W] in 0..1; every image is resized and cropped to 224²."""

    def __init__(
        self,
        path: str | Path | None = None,
        tokenizer: str | Path | None = None,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        """Load the published file.

        path: ImageReward.pt (or the same tensors as .safetensors). tokenizer: folder of bert-base-uncased's tokenizer.
        dtype: of BLIP; the head is fp32 at least. The authors score in float32. Raises ValueError as `check` does.
        """
        file, sizes = _files(path, tokenizer)
        self.name = NAME
        self.device, self.dtype = torch.device(device), tower_dtype(NAME, dtype)
        self.tokenizer = _tokenizer(needed(NAME, "tokenizer", tokenizer, WORDS), sizes.vocabulary)
        self.size = sizes.image
        loaded = {name: value for name, value in read_tensors(file).items() if name not in UNUSED}
        check_finite(NAME, file, loaded)
        with torch.device("meta"):
            self.model = Model(sizes)
        self.model.load_state_dict(loaded, assign=True)
        self.model.to(self.device, self.dtype).eval().requires_grad_(False)
        self.model.mlp.to(torch.promote_types(self.dtype, torch.float32))

    @staticmethod
    def check(path: str | Path | None, tokenizer: str | Path | None, dtype: str) -> None:
        """Raise ValueError for a file or folder that is missing, is another model's, or does not fit the other.

        So it does where a value is not finite.
        """
        file, sizes = _files(path, tokenizer)
        check_values(NAME, file)
        _tokenizer(needed(NAME, "tokenizer", tokenizer, WORDS), sizes.vocabulary)
        tower_dtype(NAME, dtype)

    @staticmethod
    def skeleton(path: str | Path | None, dtype: str) -> Skeleton:
        """By the shapes in the file, or as published; the head is small beside it."""
        file = None if path is None else existing_path(path)
        sizes = PUBLISHED if file is None else BlipSizes.of(dict(read_shapes(file)), "blip.")
        with torch.device("meta"):
            model = Model(sizes).eval().requires_grad_(False)
        return Skeleton(model, dtype_of(dtype), sizes.image, _see)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] against B prompts, about -2..2. Differentiable in the images."""
        check_pairs(NAME, images, prompts)
        ids, mask = self.words(prompts)
        pixels = clip_pixels(images.to(self.device), self.size, "even")  # in fp32: bf16 would lose what it averages
        scores: Tensor = self.model(pixels.to(self.dtype), ids, mask)
        return scores

    def words(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, 35] of the prompts: [CLS] … [SEP], cut or padded, whatever else is in the batch."""
        read = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=TOKENS)
        ids, mask = (torch.tensor(read[key], device=self.device) for key in ("input_ids", "attention_mask"))
        return ids, mask.bool()


def _see(model: Model, pixels: Tensor) -> Tensor:
    """States at [CLS], for prompts of full length."""
    ids = torch.zeros(len(pixels), TOKENS, dtype=torch.long)
    states: Tensor = model.blip(pixels, ids, ids == 0)[:, 0]
    return states


def _files(path: str | Path | None, tokenizer: str | Path | None) -> tuple[Path, BlipSizes]:
    """The weights' file and what its shapes say, after all names and shapes were compared."""
    file = needed(NAME, "path", path, WEIGHTS)
    needed(NAME, "tokenizer", tokenizer, WORDS)
    found = {name: shape for name, shape in read_shapes(file).items() if name not in UNUSED}
    try:
        sizes = BlipSizes.of(found, "blip.")
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"reward {NAME!r}: {file} has no {error}; options.path must be {WEIGHTS}") from error
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in Model(sizes).state_dict().items()}
    check_fit(NAME, file, found, wanted, WEIGHTS)
    return file, sizes


def _tokenizer(folder: Path, vocabulary: int) -> BertTokenizer:
    """BERT's lower-case word pieces, and BLIP's [DEC] and [ENC], which no prompt needs but the model counts."""
    try:
        tokenizer = BertTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # tokenizers raises that, transformers whatever its code meets
        raise ValueError(f"reward {NAME!r}: no tokenizer in {folder}; options.tokenizer must be {WORDS}") from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"reward {NAME!r}: the tokenizer in {folder} has {len(tokenizer) - 2} words, the model {vocabulary - 2}; "
            f"options.tokenizer must be {WORDS}"
        )
    return tokenizer
