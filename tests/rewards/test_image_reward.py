"""ImageReward against transformers' BLIP, PIL and a hand-written head; published names and sizes; bad files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from flowbp_ray.rewards import base, build
from flowbp_ray.rewards.blip import BlipSizes
from flowbp_ray.rewards.image_reward import UNUSED, ImageReward, Model
from flowbp_ray.rewards.preprocess import CLIP_MEAN, CLIP_STD, clip_pixels
from tests.rewards.conftest import refuses_what_is_no_picture
from tests.rewards.published_files import BLIP, WORDS, image_reward_shapes, write_image_reward

PROMPTS = ["A red cat", "a dog and a cat, on the moon", "unheard cats"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_image_reward(tmp_path_factory.mktemp("image_reward"))


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Soft random pictures in 0..1 with structure at several scales, on the grid of uint8."""
    rng = np.random.default_rng(seed)
    small = [rng.integers(0, 256, (4, 5, 3), dtype=np.uint8) for _ in range(count)]
    soft = np.stack([np.asarray(Image.fromarray(s).resize((width, height), Image.Resampling.BICUBIC)) for s in small])
    noisy = (soft.astype(int) + rng.integers(-12, 13, soft.shape)).clip(0, 255)
    return torch.from_numpy(noisy).permute(0, 3, 1, 2).float() / 255


def by_pil(image: Tensor, size: int, mode: str) -> Tensor:
    """torchvision's Resize and CenterCrop and the normalisation by PIL: "F" channel by channel, "RGB" rounding."""
    height, width = image.shape[1:]
    new = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    left, top = round((new[0] - size) / 2.0), round((new[1] - size) / 2.0)
    box = (left, top, left + size, top + size)
    how = Image.Resampling.BICUBIC
    if mode == "RGB":
        whole = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        seen = np.asarray(whole.resize(new, how).crop(box)).transpose(2, 0, 1) / 255.0
    else:
        seen = np.stack([np.asarray(Image.fromarray(c.numpy(), mode="F").resize(new, how).crop(box)) for c in image])
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return torch.from_numpy((seen - mean) / std)


def by_transformers(weights: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The score stated with transformers' BLIP models, whose names are mapped here, and a head of plain matrices."""
    size = BLIP
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=size["vision"],
            intermediate_size=4 * size["vision"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["vision"] // 64,
            image_size=size["image"],
            patch_size=size["patch"],
            layer_norm_eps=1e-6,
        )
    ).eval()
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=len(WORDS) + 2,
            hidden_size=size["text"],
            encoder_hidden_size=size["vision"],
            intermediate_size=4 * size["text"],
            num_hidden_layers=size["text_layers"],
            num_attention_heads=size["text"] // 64,
            max_position_embeddings=size["positions"],
            layer_norm_eps=1e-12,
        ),
        add_pooling_layer=False,
    ).eval()
    names = {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding",
        "patch_embed.proj": "embeddings.patch_embedding",
        "blocks.": "encoder.layers.",
        ".norm1.": ".layer_norm1.",
        ".norm2.": ".layer_norm2.",
        ".attn.qkv.": ".self_attn.qkv.",
        ".attn.proj.": ".self_attn.projection.",
    }
    seen = {}
    for key, value in weights.items():
        if key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            for old, new in names.items():
                name = name.replace(old, new)
            seen[f"post_layernorm.{name.removeprefix('norm.')}" if name.startswith("norm.") else name] = value
    vision.load_state_dict(seen)
    read = {k.removeprefix("blip.text_encoder."): v for k, v in weights.items() if k.startswith("blip.text_encoder.")}
    text.load_state_dict({k: v for k, v in read.items() if k != "embeddings.position_ids"})
    with torch.no_grad():
        image = vision(pixels).last_hidden_state
        state = text(ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state[:, 0]
        for layer in (0, 2, 4, 6, 7):
            state = state @ weights[f"mlp.layers.{layer}.weight"].T + weights[f"mlp.layers.{layer}.bias"]
    return (state[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_equals_transformers_blip_and_plain_matrices(options: dict[str, str]) -> None:
    reward = build("image_reward", **options)
    images = pictures(3, 80, 96)
    weights = torch.load(options["path"], weights_only=True)
    pixels = torch.stack([by_pil(image, BLIP["image"], "F") for image in images]).float()
    ids = torch.zeros(3, 35, dtype=torch.long)
    words = [[2, 5, 6, 7, 3], [2, 5, 10, 9, 5, 7, 11, 12, 13, 14, 3], [2, 1, 7, 8, 3]]  # [CLS] a red cat [SEP], …
    for row, read in zip(ids, words, strict=True):
        row[: len(read)] = torch.tensor(read)
    expected = by_transformers(weights, pixels, ids, (ids != 0).long())
    with torch.no_grad():
        scores = reward.score(images, PROMPTS)
    assert scores.std() > 0.05  # else the comparison would say nothing
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_long_prompt_is_cut_to_35_tokens(options: dict[str, str]) -> None:
    reward = ImageReward(**options)
    ids, mask = reward.words(["cat " * 60, "cat"])
    assert ids.tolist() == [[2, *[7] * 33, 3], [2, 7, 3, *[0] * 32]]
    assert mask.sum(1).tolist() == [35, 3]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 80), (50, 131), (300, 300)])
def test_pixels_equal_pil(height: int, width: int) -> None:
    images = pictures(2, height, width, seed=height)
    exact = torch.stack([by_pil(image, 64, "F") for image in images])
    torch.testing.assert_close(clip_pixels(images.double(), 64, "even"), exact.double(), rtol=0, atol=1e-5)
    rounded = torch.stack([by_pil(image, 64, "RGB") for image in images])
    std = torch.tensor(CLIP_STD).view(3, 1, 1)
    assert ((clip_pixels(images, 64, "even") - rounded).abs() * std).mean() <= 2e-3  # in units of 0..1


def test_gradient_equals_finite_differences_in_fp64(options: dict[str, str]) -> None:
    reward = ImageReward(**options, dtype="float64")
    images = pictures(2, 70, 90).double().requires_grad_(True)
    reward.score(images, PROMPTS[:2]).sum().backward()
    assert images.grad is not None
    assert all(not p.requires_grad for p in reward.model.parameters())
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        way = torch.randn(images.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (reward.score(images + s * 1e-5 * way, PROMPTS[:2]).sum() for s in (1, -1))
        assert (images.grad * way).sum().item() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-5)


def test_a_row_is_scored_alone(options: dict[str, str]) -> None:
    reward = ImageReward(**options)
    images, texts = pictures(6, 64, 64), PROMPTS * 2
    with torch.no_grad():
        together = reward.score(images, texts)
        alone = torch.cat([reward.score(images[i : i + 1], texts[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs one prompt per image, got 6 and 2"):
        reward.score(images, texts[:2])


def test_bfloat16_stays_near(options: dict[str, str]) -> None:
    images = pictures(3, 64, 64)
    with torch.no_grad():
        exact, coarse = (ImageReward(**options, dtype=d).score(images, PROMPTS) for d in ("float32", "bfloat16"))
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, exact, rtol=0.05, atol=0.1 * exact.std().item() + 0.05)


def test_the_published_model_has_these_names_and_sizes() -> None:
    """BLIP-L on the meta device: 606 tensors of the names written out in `published_files`, 445.8 M parameters."""
    size = {"vision": 1024, "layers": 24, "patch": 16, "image": 224, "text": 768, "text_layers": 12, "positions": 512}
    shapes = {k: v for k, v in image_reward_shapes(**size, words=30524).items() if k not in UNUSED}
    with torch.device("meta"):
        model = Model(BlipSizes.of(shapes, "blip."))
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == shapes
    # By hand. ViT: 24 blocks of 12 d² + 13 d, patches 768 d + d, 197 places, class token, last norm.
    # Text: 12 layers of 4 e² + 4 e (self), 2 e² + 2 d e + 4 e (cross), 8 e² + 5 e, three norms; tables and their norm.
    d, e = 1024, 768
    vision = 24 * (12 * d * d + 13 * d) + 769 * d + 197 * d + d + 2 * d
    text = 12 * (14 * e * e + 2 * d * e + 13 * e + 6 * e) + (30524 + 512 + 2) * e
    mlp = sum(a * b + b for a, b in ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)))
    assert sum(p.numel() for p in model.parameters()) == vision + text + mlp
    assert len(shapes) == 4 + 24 * 12 + 2 + 4 + 12 * 26 + 10


def test_unused_tensors_are_known_by_name_and_others_refused(options: dict[str, str], tmp_path: Path) -> None:
    weights = torch.load(options["path"], weights_only=True)
    assert set(UNUSED) < set(weights)  # the fixture has them all, and loads
    slim = {k: v.contiguous() for k, v in weights.items() if k not in UNUSED}
    save_file(slim, tmp_path / "slim.safetensors")
    images = pictures(1, 64, 64)
    with torch.no_grad():
        a = ImageReward(**options).score(images, PROMPTS[:1])
        b = ImageReward(path=tmp_path / "slim.safetensors", tokenizer=options["tokenizer"]).score(images, PROMPTS[:1])
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def refused(change: dict[str, Tensor | None], match: str) -> None:
        changed = {k: v for k, v in (weights | change).items() if v is not None}
        torch.save(changed, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=match) as caught:
            base.check("image_reward", {"path": str(tmp_path / "bad.pt"), "tokenizer": options["tokenizer"]})
        assert "\n" not in str(caught.value) and "bad.pt" in str(caught.value)

    key = "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight"
    refused(
        {key: None}, rf"it lacks 1 of \d+ tensors \({key}, …\); it should be ImageReward.pt .* of THUDM/ImageReward"
    )
    refused({"blip.text_decoder.cls.bias": torch.zeros(2)}, r"it has 1 others \(blip.text_decoder.cls.bias, …\)")
    refused({key: torch.zeros(64, 64)}, rf"{key} is \(64, 64\), not \(64, 128\)")
    refused({"blip.visual_encoder.cls_token": None}, "ImageReward.pt .* of THUDM/ImageReward")
    spoiled = weights | {key: weights[key].clone().index_fill_(0, torch.tensor([1]), float("nan"))}
    torch.save(spoiled, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=f"{key} in .*nan.pt has values that are not finite"):
        ImageReward(path=tmp_path / "nan.pt", tokenizer=options["tokenizer"])


def test_missing_and_foreign_files_are_refused_before_anything_starts(options: dict[str, str], tmp_path: Path) -> None:
    base.check("image_reward", options)
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "empty").mkdir()
    shutil.copytree(options["tokenizer"], tmp_path / "short")
    (tmp_path / "short" / "vocab.txt").write_text("\n".join(WORDS[:-1]))
    for change, match in (
        ({"path": None}, "needs options.path: ImageReward.pt"),
        ({"path": str(tmp_path / "no.pt")}, "no.pt', which does not exist; write the path of ImageReward.pt"),
        ({"path": str(tmp_path / "text.pt")}, "text.pt cannot be read as weights"),
        ({"tokenizer": None}, "needs options.tokenizer: a folder with the tokenizer of google-bert/bert-base-uncased"),
        ({"tokenizer": str(tmp_path / "empty")}, "the tokenizer in .*empty has 5 words, the model 15"),
        ({"tokenizer": str(tmp_path / "short")}, "has 14 words, the model 15"),
        ({"dtype": "float31"}, "options.dtype must be one of .* got 'float31'"),
        ({"med_config": "x"}, "it takes path, tokenizer, device, dtype"),
    ):
        with pytest.raises(ValueError, match=match):
            base.check("image_reward", options | change)


def test_pictures_of_another_type_are_refused(options: dict[str, str]) -> None:
    refuses_what_is_no_picture(build("image_reward", **options))
