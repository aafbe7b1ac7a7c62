"""PickScore against transformers' own forward, tokens spelt out by hand and pictures by Pillow."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flowbp_ray.rewards import base
from flowbp_ray.rewards.pickscore import PickScore
from tests.rewards.tiny_clip import (
    PROMPTS,
    SIDE,
    break_weights,
    clip_model,
    open_clip,
    pictures,
    pil,
    save_clip,
    save_tokenizer,
    set_type,
    spelt,
    wanted,
)


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    return clip_model("gelu", seed=3)  # ViT-H's activation


@pytest.fixture(scope="module")
def folder(model: CLIPModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("pick"), model)


def test_the_score_is_the_models_logit(model: CLIPModel, folder: Path) -> None:
    """exp(t) cos = the diagonal of what CLIPModel returns; options.scale multiplies it."""
    images = pictures(4, 41, 58)
    with torch.no_grad():
        out = model(
            input_ids=torch.cat([spelt(text) for text in PROMPTS]),
            pixel_values=torch.cat([wanted(image) for image in images]),
        )
    expected = out.logits_per_image.diagonal()
    torch.testing.assert_close(PickScore(folder).score(images, PROMPTS), expected, rtol=1e-4, atol=1e-3)
    assert expected.std() > 1 and expected.abs().max() <= 100  # exp(t) is 100
    scaled = PickScore(folder, scale=1 / 26).score(images, PROMPTS)
    torch.testing.assert_close(scaled, expected / 26, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_temperature_does_not_depend_on_the_towers_dtype(model: CLIPModel, folder: Path, dtype: str) -> None:
    """bfloat16 knows of 4.6052, what was published, only 4.59375, whose exponential is 1 % less."""
    exact = math.exp(model.logit_scale.item())
    assert exact != pytest.approx(math.exp(model.logit_scale.bfloat16().item()), rel=1e-4)
    assert PickScore(folder, scale=0.5, dtype=dtype).factor.item() == pytest.approx(0.5 * exact, rel=1e-6)


def test_pictures_of_8_bits_score_alike(model: CLIPModel, folder: Path) -> None:
    """transformers' own processor on Pillow images, which rounds to 8 bits after the resize."""
    size = {"shortest_edge": SIDE}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": SIDE, "width": SIDE})
    images = pictures(3, 90, 64)
    tokens = CLIPTokenizer.from_pretrained(folder)(PROMPTS[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(**tokens, **processor([pil(image) for image in images], return_tensors="pt"))
    found = PickScore(folder, scale=0.01).score(images, PROMPTS[:3])
    torch.testing.assert_close(found, out.logits_per_image.diagonal() / 100, rtol=0, atol=0.02)


def test_tokens_are_those_of_the_published_vocabulary(tmp_path: Path) -> None:
    """The tokenizer of a folder with CLIP's 49408 words reads as open_clip's does, up to 77 tokens, cut or padded."""
    package = open_clip()
    known = package.tokenizer.SimpleTokenizer()
    merges = sorted(known.bpe_ranks, key=known.bpe_ranks.__getitem__)
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {marks.get(word, word): i for word, i in known.encoder.items()}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["A photo of 2 dogs, it's raining!", "über-café   naïve", "3.5mm f/1.8 (50%) -- 8k", "many words " * 60, ""]
    for text in texts:
        ids = tokenizer(text, padding="max_length", truncation=True, max_length=77, return_tensors="pt")["input_ids"]
        theirs = known(text)
        end = int(theirs[0].argmax())  # the rest is padding, zeros there
        assert torch.equal(ids[0, : end + 1], theirs[0, : end + 1]) and (ids[0, end:] == 49407).all()


def test_the_tokenizer_may_lie_elsewhere(model: CLIPModel, folder: Path, tmp_path: Path) -> None:
    bare, words = save_clip(tmp_path / "bare", model, tokenizer=False), save_tokenizer(tmp_path / "words")
    with pytest.raises(
        ValueError, match=r"bare has no tokenizer; write options.tokenizer: the folder of a CLIP tokeniz"
    ):
        base.check("pickscore", {"path": str(bare)})
    images = pictures(2, SIDE, SIDE)
    found = PickScore(bare, tokenizer=words).score(images, PROMPTS[:2])
    assert torch.equal(found, PickScore(folder).score(images, PROMPTS[:2]))
    with pytest.raises(ValueError, match=r"options.tokenizer is .*which has no tokenizer.json or vocab.json"):
        PickScore(bare, tokenizer=bare)


def test_folders_that_are_something_else(model: CLIPModel, tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip", model)

    def check_says(message: str) -> None:
        with pytest.raises(ValueError, match=f"^reward 'pickscore': .*{message}") as caught:
            base.check("pickscore", {"path": str(folder)})
        assert "\n" not in str(caught.value)

    with pytest.raises(ValueError, match=r"options.scale must be a number above 0, got 0"):
        base.check("pickscore", {"path": str(folder), "scale": 0})
    set_type(folder, "siglip")
    check_says("a model of type 'siglip' and not 'clip'")
    (folder / "config.json").write_text("<html>")
    check_says("whose config.json is not one of transformers")
    (folder / "config.json").unlink()
    check_says("has no config.json; it should be the folder of yuvalkirstain/PickScore_v1")
    save_clip(folder, model)
    (folder / "model.safetensors").rename(folder / "half.safetensors")
    check_says("has no model.safetensors or pytorch_model.bin")


def test_weights_that_are_something_else(model: CLIPModel, tmp_path: Path) -> None:
    """A tensor that is left out would be drawn at random, in silence."""
    folder = save_clip(tmp_path, model)

    def both_say(message: str) -> None:
        for refusing in (lambda: base.check("pickscore", {"path": str(folder)}), lambda: PickScore(folder)):
            with pytest.raises(ValueError, match=f"^reward 'pickscore': .*{message}") as caught:
                refusing()
            assert "\n" not in str(caught.value)

    break_weights(folder, drop=["visual_projection.weight", "logit_scale"])
    both_say(r"2 of \d+ weights are missing, e.g. logit_scale; download it again")
    save_clip(folder, model)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"logit_scale": torch.tensor(math.nan)}, folder / "model.safetensors", {"format": "pt"})
    both_say("logit_scale has values that are not finite")
    narrow = {"text_projection.weight": weights["text_projection.weight"][:-1].clone()}
    save_file(weights | narrow, folder / "model.safetensors", {"format": "pt"})
    both_say("text_projection.weight is .* in its weights and .* by config.json")
    clip_model().vision_model.save_pretrained(folder / "part")
    (folder / "part" / "model.safetensors").rename(folder / "model.safetensors")
    both_say("weights are missing")
    (folder / "model.safetensors").write_bytes(b"<html>404</html>")
    both_say("its weights cannot be read")
    save_clip(folder, model)
    (folder / "tokenizer.json").write_text("{")
    both_say("whose tokenizer cannot be read .*; download it again")
    save_clip(folder, model)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projection_dim": "many"}))
    both_say("config.json describes no CLIP model .*projection_dim")


@pytest.mark.parametrize("scale", ["a", 0.0, -1, float("inf"), float("nan"), None])
def test_a_scale_that_is_none_is_refused(folder: Path, scale: object) -> None:
    with pytest.raises(ValueError, match=r"options\.scale must be a number above 0"):
        base.check("pickscore", {"path": str(folder), "scale": scale})
