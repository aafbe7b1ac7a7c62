"""The committed models: they load offline, match their card, and run in the stock diffusers pipeline."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
import torch

from benchmarks.make_shapes.sampling import decode, sample_latents, score, sigma_grid
from benchmarks.make_shapes.vae import evaluate
from flowbp_ray.shapes import load_prompts, model_dir
from flowbp_ray.shapes.captions import WORDS
from flowbp_ray.shapes.prompts import DATA
from flowbp_ray.shapes.text import TOKENS, ShapesModels, encode_prompts, load_models, load_pipeline, tokenize


@pytest.fixture(scope="module")
def models() -> ShapesModels:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return load_models()


def test_sizes_and_digests_match_the_card() -> None:
    card = (DATA / "README.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| (\S+\.safetensors) \|.*\| ([0-9a-f]{64}) \|$", card, re.MULTILINE))
    files = {path.relative_to(DATA).as_posix(): path for path in model_dir().rglob("*.safetensors")}
    assert stated == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert sum(path.stat().st_size for path in DATA.rglob("*.safetensors")) <= 25e6


def test_architecture(models: ShapesModels) -> None:
    def count(module: torch.nn.Module) -> float:
        return sum(p.numel() for p in module.parameters()) / 1e6

    assert 5.0 < count(models.transformer) < 6.0
    assert 0.9 < count(models.vae) < 1.0
    assert 0.2 < count(models.text_encoder) < 0.4
    assert models.transformer.config.num_layers == 6
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in models.transformer.parameters())


def test_every_word_has_a_token(models: ShapesModels) -> None:
    ids = tokenize(list(WORDS), models.tokenizer)
    assert ids.shape == (len(WORDS), TOKENS)
    assert len(set(ids[:, 1].tolist())) == len(WORDS)
    with pytest.raises(ValueError, match="has a word that the shapes grammar lacks"):
        tokenize(["a mauve star"], models.tokenizer)
    with pytest.raises(ValueError, match="at most 12 words"):
        tokenize(["a star and " * 5 + "a ring"], models.tokenizer)


def test_embeddings(models: ShapesModels) -> None:
    embeds, pooled = encode_prompts(["a red star", "a blue star", ""], models.tokenizer, models.text_encoder)
    assert embeds.shape == (3, TOKENS, 128) and pooled.shape == (3, 128)
    assert not embeds.requires_grad
    assert (pooled[0] - pooled[1]).norm() > 1e-2
    one, _ = encode_prompts(["a red star"], models.tokenizer, models.text_encoder)
    torch.testing.assert_close(one[0], embeds[0], atol=1e-5, rtol=1e-5)
    named = json.loads((model_dir() / "conditioning.json").read_text(encoding="utf-8"))
    assert named == {"prompt_embeds": "last_hidden_state", "pooled_prompt_embeds": "text_embeds", "tokens": TOKENS}


def test_reconstructions(models: ShapesModels) -> None:
    psnr, passed = evaluate(models.vae, seed=5, n=200)
    assert psnr >= 33
    assert passed >= 0.98


def test_the_stock_pipeline_draws_what_plain_euler_draws(models: ShapesModels) -> None:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    text = encode_prompts(["a red circle", "a black star"], models.tokenizer, models.text_encoder)
    negative = encode_prompts(["", ""], models.tokenizer, models.text_encoder)
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    steps, shift = 8, float(models.scheduler.config.shift)
    images = pipe(
        prompt_embeds=text[0],
        pooled_prompt_embeds=text[1],
        negative_prompt_embeds=negative[0],
        negative_pooled_prompt_embeds=negative[1],
        latents=noise,
        height=64,
        width=64,
        guidance_scale=2.0,
        sigmas=np.linspace(1.0, 1 / steps, steps),
        output_type="np",
    ).images
    row = encode_prompts([""], models.tokenizer, models.text_encoder)
    latents = sample_latents(models.transformer, text, row, noise, sigma_grid(steps, shift), 2.0)
    ours = decode(models.vae, latents)
    assert images.shape == (2, 64, 64, 3)
    assert np.abs(images * 255 - ours).max() <= 1.0


def test_the_base_is_recognisable_and_can_be_improved(models: ShapesModels) -> None:
    """A sixth of the held-out prompts, without guidance: far from nothing, far from finished."""
    prompts = load_prompts("heldout")[::6]
    text = encode_prompts([p.text for p in prompts], models.tokenizer, models.text_encoder)
    noise = torch.randn(len(prompts), 8, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = sample_latents(models.transformer, text, text, noise, sigma_grid(16, 1.0), 1.0)
    result = score(decode(models.vae, latents), prompts)
    assert 0.1 <= result.passed <= 0.8
    assert result.entropy > 2.0
