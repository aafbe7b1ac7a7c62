"""The rollout is the pipeline: the same prompts and noise give diffusers' sigmas, latents and images."""

from __future__ import annotations

import pytest
import torch

from flowbp_ray.backbones import tokens
from flowbp_ray.backbones.registry import build_backbone
from flowbp_ray.backbones.sigmas import static_shift
from flowbp_ray.config.sections import BackboneConfig
from tests.backbones import tiny
from tests.backbones.families import PROMPTS, Family, noise_of, relative
from tests.conftest import Saved

SIZES = [(32, 32), (32, 80), (112, 48)]


@pytest.fixture(scope="module", params=tiny.NAMES)
def family(request: pytest.FixtureRequest, saved: Saved) -> Family:
    return Family.saved(request.param, saved)


@pytest.mark.parametrize("rows", [[1], [0, 1, 3]], ids=["one row", "three rows"])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_finished_latent_is_the_pipeline_s(
    family: Family, size: tuple[int, int], guidance: float, rows: list[int]
) -> None:
    noise, sigmas = noise_of(family, *size, len(rows)), family.backbone.sigmas(4, *size)
    expected = family.call(*size, guidance, 4, noise, rows, "latent")
    assert torch.equal(sigmas, family.pipe.scheduler.sigmas)
    finished = family.rollout(sigmas, guidance, noise, rows)
    assert relative(family.as_latent(finished), expected) <= 1e-5
    assert relative(family.as_latent(noise), expected) > 1e-2  # the transformer did something


def test_the_prompt_the_guidance_and_the_time_reach_the_model(family: Family) -> None:
    """Else a wrong input could hide behind a model that ignores it."""
    noise, sigmas = noise_of(family, 32, 32, 1), family.backbone.sigmas(4, 32, 32)
    base = family.rollout(sigmas, 3.5, noise, [0])
    assert relative(family.rollout(sigmas, 3.5, noise, [1]), base) > 1e-4
    assert relative(family.rollout(sigmas, 1.0, noise, [0]), base) > 1e-4
    cond = family.embeddings.rows([0])
    if family.backbone.embedded_guidance:
        cond["guidance"] = torch.tensor([3.5])
    with torch.no_grad():
        one, two = (family.backbone.predict(family.transformer, noise, torch.tensor([s]), cond) for s in (0.9, 0.3))
    assert relative(two, one) > 1e-4


@pytest.mark.parametrize("steps", [1, 3, 25, 40])
@pytest.mark.parametrize("size", [(16, 16), (48, 112), (64, 64)], ids=str)
def test_sigmas_are_the_pipeline_s_bit_for_bit(family: Family, size: tuple[int, int], steps: int) -> None:
    if steps == 1 and family.name == "qwen_image":  # stretched to a terminal of 0.02, of which one step has none
        with pytest.raises(ValueError, match="num_steps must be at least 2, got 1"):
            family.backbone.sigmas(steps, *size)
        return
    family.call(*size, 1.0, steps, noise_of(family, *size, 1), [0], "latent")
    sigmas = family.backbone.sigmas(steps, *size)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,) and sigmas[-1] == 0
    assert torch.equal(sigmas, family.pipe.scheduler.sigmas)


@pytest.mark.parametrize("size", [(32, 32), (48, 80)], ids=str)
def test_the_decoded_image_is_the_pipeline_s(family: Family, size: tuple[int, int]) -> None:
    noise, rows = noise_of(family, *size, 2), [0, 1]
    expected = family.call(*size, 3.5, 3, noise, rows, "pt")
    finished = family.rollout(family.backbone.sigmas(3, *size), 3.5, noise, rows)
    with torch.no_grad():
        images = family.backbone.load_decoder()(finished)
    assert images.shape == (2, 3, *size) and images.min() >= 0 and images.max() <= 1
    assert expected.std() > 1e-3
    assert float((images - expected).abs().max()) <= 1e-5


def test_decoding_has_the_gradient_of_finite_differences(family: Family) -> None:
    """Along the gradient itself, where a central difference is largest."""
    decode = family.backbone.load_decoder()
    z = noise_of(family, 32, 48, 1).requires_grad_()
    pull = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    gradient = torch.autograd.grad((decode(z) * pull).sum(), z)[0]
    with torch.no_grad():
        step = 1e-3 * gradient / gradient.norm()
        change = ((decode(z + step) - decode(z - step)).double() * pull).sum() / 2e-3
    assert float(gradient.norm()) == pytest.approx(float(change), rel=3e-2)


@torch.no_grad()
def test_the_encoder_is_the_pipeline_s(family: Family) -> None:
    """Bit for bit, the empty prompt's too; padding beyond a prompt's own length is masked."""
    for i, text in enumerate([*PROMPTS, ""]):
        found = family.embeddings.rows([i]) if i < len(PROMPTS) else family.embeddings.negative(1)
        mask = found.get("prompt_embeds_mask")
        keywords = {"do_classifier_free_guidance": False} if family.name == "sd35" else {}
        others = (None, None) if family.name == "sd35" else ()
        answers = [a for a in family.pipe.encode_prompt([text], *others, **keywords) if a is not None]
        expected = answers[0]
        value = found["prompt_embeds"]
        if mask is not None:
            assert int(mask.sum()) == int(mask[:, : expected.shape[1]].sum()) == expected.shape[1]
            value = value[:, : expected.shape[1]]
        assert torch.equal(value, expected)
        if family.name in ("sd35", "flux1"):  # their second answer is the pooled embedding
            assert torch.equal(found["pooled_prompt_embeds"], answers[1])


def test_states_keep_the_dtype_of_the_model(family: Family) -> None:
    size = (32, 48)
    noise, sigmas = noise_of(family, *size, 2), family.backbone.sigmas(3, *size)
    exact = family.rollout(sigmas, 3.5, noise, [0, 1])
    family.transformer.to(torch.bfloat16)
    try:
        rough = family.rollout(sigmas, 3.5, noise.bfloat16(), [0, 1])
    finally:
        family.transformer = family.backbone.load_transformer(torch.float32)
    assert rough.dtype == torch.bfloat16
    assert relative(rough.float(), exact) < 0.1


def test_packing_is_the_pipelines() -> None:
    """unpatchify and flatten against the static methods of FluxPipeline and Flux2KleinPipeline."""
    from diffusers import Flux2KleinPipeline, FluxPipeline

    latents = torch.randn(2, 16, 6, 10)
    packed = FluxPipeline._pack_latents(latents, 2, 16, 6, 10)
    assert torch.equal(tokens.unpatchify(tokens.unflatten(packed, 3, 5)), latents)
    assert torch.equal(tokens.flatten(tokens.unflatten(packed, 3, 5)), packed)
    patched = Flux2KleinPipeline._patchify_latents(latents)
    assert torch.equal(tokens.unpatchify(patched), latents)
    assert torch.equal(tokens.flatten(patched), Flux2KleinPipeline._pack_latents(patched))


def test_an_even_grid_for_sd35_is_stepped_before_the_shift(saved: Saved) -> None:
    """The published runs' grid; diffusers' own is the default and ends lower."""
    folder, pipe = saved("sd35")
    path = str(folder)
    even, own = (build_backbone(BackboneConfig(name="sd35", path=path, sigmas=kind)) for kind in ("even", "pipeline"))
    assert torch.equal(even.sigmas(25, 32, 32), static_shift(25, pipe.scheduler.config.shift))
    assert own.sigmas(25, 32, 32)[-2] < 0.3 * even.sigmas(25, 32, 32)[-2]
