"""Preprocessing against Pillow, torchvision and open_clip: sizes, rounding, crops, borders, and the slope."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flowbp_ray.rewards.preprocess import CLIP_MEAN, CLIP_STD, clip_pixels, normalise, padded_pixels, resize
from tests.rewards.tiny_clip import floats, open_clip, pictures, pil

SIZES = [(64, 64), (224, 224), (512, 512), (300, 201), (201, 300), (37, 501), (501, 37), (224, 300), (96, 97), (3, 2)]
MEAN, STD = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def image(request: pytest.FixtureRequest) -> Tensor:
    return pictures(1, *request.param)[0]


@pytest.mark.parametrize("to", [(224, 224), (32, 48), (7, 300)])
def test_resize_is_pillows(image: Tensor, to: tuple[int, int]) -> None:
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    for picture in (image, noise):
        found = resize(picture[None], *to)[0]
        torch.testing.assert_close(found, floats(picture, *to), rtol=0, atol=1e-6)
        other = F.interpolate(picture[None].double(), to, mode="bicubic", antialias=True, align_corners=False)[0]
        torch.testing.assert_close(found.double(), other, rtol=0, atol=2e-6)


def test_clip_pixels_are_pillows(image: Tensor) -> None:
    """In floating point to 1e-5 of a level, with the sizes and corners of transformers; through 8 bits to 2e-3."""
    height, width = image.shape[1:]
    short = min(height, width)
    tall, wide = (224 * height) // short, (224 * width) // short
    top, left = (tall - 224) // 2, (wide - 224) // 2
    found = (clip_pixels(image[None], 224)[0] * STD) + MEAN
    cropped = floats(image, tall, wide)[:, top : top + 224, left : left + 224]
    torch.testing.assert_close(found, cropped, rtol=0, atol=1e-5)
    # Not from the package: its image processors differ by what is installed, this one is plain Pillow and numpy.
    processor = importlib.import_module("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil()
    rounded = processor(pil(image), return_tensors="pt")["pixel_values"][0] * STD + MEAN
    assert (found.clamp(0, 1) - rounded).abs().mean() <= 2e-3
    assert rounded.std() > 0.05  # a comparison of something


def test_padded_pixels_are_pillows(image: Tensor) -> None:
    """HPSv2's: the longest side becomes 224, the other rounds to the nearest; black around it before mean and std."""
    height, width = image.shape[1:]
    scale = 224 / max(height, width)
    tall, wide = round(height * scale), round(width * scale)
    canvas = torch.zeros(3, 224, 224)
    top, left = (224 - tall) // 2, (224 - wide) // 2
    canvas[:, top : top + tall, left : left + wide] = floats(image, tall, wide)
    found = (padded_pixels(image[None], 224)[0] * STD) + MEAN
    torch.testing.assert_close(found, canvas, rtol=0, atol=1e-5)


def test_padded_pixels_are_those_of_open_clip(image: Tensor) -> None:
    transform = open_clip().image_transform(
        224, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, resize_mode="longest", fill_color=0
    )
    rounded = transform(pil(image)) * STD + MEAN
    found = padded_pixels(image[None], 224)[0] * STD + MEAN
    assert (found.clamp(0, 1) - rounded).abs().mean() <= 2e-3
    assert rounded.std() > 0.05


def test_even_middles_are_torchvisions(image: Tensor) -> None:
    """What OpenAI's own preprocessing does, here on tensors, where torchvision does not round to 8 bits."""
    open_clip()  # lets torchvision in
    vision = importlib.import_module("torchvision.transforms")
    steps = vision.Compose(
        [
            vision.Resize(224, interpolation=vision.InterpolationMode.BICUBIC, antialias=True),
            vision.CenterCrop(224),
            vision.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    torch.testing.assert_close(clip_pixels(image[None], 224, "even")[0], steps(image), rtol=0, atol=1e-4)


def test_where_the_middles_differ() -> None:
    """A surplus of 3 pixels: one of them before the crop, or two."""
    image = torch.arange(7.0).expand(1, 3, 4, 7) / 7
    down, even = ((clip_pixels(image, 4, middle)[0] * STD + MEAN)[0, 0] * 7 for middle in ("down", "even"))
    torch.testing.assert_close(down, torch.tensor([1.0, 2, 3, 4]))
    torch.testing.assert_close(even, torch.tensor([2.0, 3, 4, 5]))


@pytest.mark.parametrize("prepare", [clip_pixels, padded_pixels])
def test_gradients(prepare: object) -> None:
    assert callable(prepare)
    for height, width in [(9, 6), (5, 8), (7, 7)]:
        image = torch.rand(2, 3, height, width, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: prepare(x, 7), image)


def test_a_long_line_keeps_a_pixel() -> None:
    """A side that would round to nothing is one pixel."""
    found = padded_pixels(torch.ones(1, 3, 2, 4000), 224)[0] * STD + MEAN
    torch.testing.assert_close(found.sum((1, 2)), torch.full((3,), 224.0))


def test_values_are_computed_in_fp32_at_least() -> None:
    image = pictures(1, 40, 50)
    assert clip_pixels(image.double(), 32).dtype == torch.float64
    half = image.bfloat16()
    assert torch.equal(clip_pixels(half, 32), clip_pixels(half.float(), 32))
    torch.testing.assert_close(normalise(image)[:, 1], (image[:, 1] - 0.4578275) / 0.26130258)
    with pytest.raises(
        ValueError, match=r"images must be float \[B, 3, H, W\] in 0..1, got torch.uint8 \(1, 3, 4, 4\)"
    ):
        clip_pixels(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 32)
