"""What a learner differentiates against the written-out formula; what the classes say about guidance; LoRA targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowbp_ray.backbones import Conditioning, encode_all
from flowbp_ray.backbones.base import padded
from flowbp_ray.backbones.guidance import full_velocity, trained_velocity
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config.learners import LoraConfig
from flowbp_ray.local import encode
from flowbp_ray.weights import trainable
from tests.backbones import tiny
from tests.conftest import Saved
from tests.small import small_config

SIZE, G = (32, 48), 3.5


class Setting:
    """A loaded family with a batch of two states at different nodes and their prompts."""

    def __init__(self, name: str, saved: Saved) -> None:
        self.name, self.backbone = name, backbone_named(name, str(saved(name)[0]))
        self.transformer = self.backbone.load_transformer(torch.float32)
        table = encode_all(self.backbone.load_encoder(), ["a red circle", "two blue squares"])
        self.cond, self.negative = table.rows([0, 1]), table.negative(2)
        self.sigmas = self.backbone.sigmas(6, *SIZE)
        generator = torch.Generator().manual_seed(0)
        self.x, self.u = torch.randn(2, 2, *self.backbone.latent_shape(*SIZE), generator=generator)
        self.node, self.row = torch.tensor([1, 4]), torch.tensor([0, 1])

    def branch(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        return self.backbone.predict(self.transformer, x, self.sigmas[self.node], conditioning)

    def wanted(self, x: Tensor, detach: bool) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598) and QwenImagePipeline's norm, as [B, C, rows, columns]."""
        if self.name == "flux1":
            return self.branch(x, self.cond | {"guidance": torch.full((2,), G)})
        one, two = self.branch(x, self.cond), self.branch(x, self.negative)
        if detach:
            two = two.detach()
        v = two + G * (one - two)
        if self.name == "qwen_image":
            v = v * (one.square().sum(1, keepdim=True).sqrt() / v.square().sum(1, keepdim=True).sqrt())
        return v

    def gradients(self, v: Tensor, x: Tensor) -> Tensor:
        """VJP with u to the weights and to x, all in one vector."""
        wrt = [x, *(p for p in self.transformer.parameters())]
        found = torch.autograd.grad((v * self.u).sum(), wrt, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])


@pytest.fixture(scope="module", params=tiny.NAMES)
def setting(request: pytest.FixtureRequest, saved: Saved) -> Setting:
    return Setting(request.param, saved)


def test_how_far_the_prompts_are_padded_changes_no_bit(setting: Setting) -> None:
    """Rows have their own lengths; before, all had that of the run's longest prompt. Only Qwen-Image's differ."""
    s, most = setting, 40 if setting.name == "qwen_image" else 0
    lengths = {s.cond["prompt_embeds"].shape[1], s.negative["prompt_embeds"].shape[1]}
    assert (len(lengths) > 1) == (s.name == "qwen_image")
    wide = [{n: padded(t, max(t.shape[1], most)) if n.startswith("prompt_") else t for n, t in c.items()}
            for c in (s.cond, s.negative)]  # fmt: skip
    for guidance in (1.0, G):
        own, far = (full_velocity(s.backbone, s.transformer, s.sigmas, *c, guidance)(s.x, s.node, s.row)
                    for c in ((s.cond, s.negative), wide))  # fmt: skip
        assert torch.equal(own, far)


@pytest.mark.parametrize("detach", [True, False])
def test_a_learner_s_products_are_those_of_the_guided_velocity(setting: Setting, detach: bool) -> None:
    s, x = setting, setting.x.clone().requires_grad_()
    expected = s.gradients(s.wanted(x, detach), x)
    bound = trained_velocity(s.backbone, s.transformer, s.sigmas, s.cond, s.negative, G, detach_negative=detach)
    value = s.gradients(bound(x, s.node, s.row), x)
    assert value.shape == expected.shape
    assert float((value - expected).norm() / expected.norm()) < 1e-5
    other = s.gradients(s.wanted(x, not detach), x)
    assert s.backbone.embedded_guidance or float((other - expected).norm() / expected.norm()) > 1e-3


def test_the_meter_sees_what_the_learner_runs(setting: Setting) -> None:
    s, seen = setting, []
    arguments = (s.backbone, s.transformer, s.sigmas, s.cond, s.negative, G)
    with torch.no_grad():
        full_velocity(*arguments, observe=seen.append)(s.x, s.node, s.row)
        run = trained_velocity(*arguments, detach_negative=True)(s.x, s.node, s.row)
    assert torch.allclose(seen[0], run, rtol=1e-4, atol=1e-5)


def test_a_sampler_asks_once_and_an_embedded_guidance_has_no_second_branch(setting: Setting) -> None:
    s, rows = setting, []
    hook = s.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    with torch.no_grad():
        for g in (G, 1.0):
            full_velocity(s.backbone, s.transformer, s.sigmas, s.cond, s.negative, g)(s.x, s.node, s.row)
    hook.remove()
    assert rows == {"flux1": [2, 2], "qwen_image": [2, 2, 2]}.get(s.name, [4, 2])


def test_the_lora_targets_are_all_there_and_train(setting: Setting) -> None:
    s = setting
    transformer = s.backbone.load_transformer(torch.float32)
    modules = [name for name, _ in transformer.named_modules()]
    for target in s.backbone.lora_targets:
        assert any(name == target or name.endswith(f".{target}") for name in modules), target
    trainable.prepare(transformer, LoraConfig(rank=2, alpha=2), 0, s.backbone.lora_targets)
    trained = trainable.trained(transformer)
    blocks = sum(len(getattr(transformer, key, ())) for key in ("transformer_blocks", "single_transformer_blocks"))
    assert len(trained) >= 2 * 3 * blocks or s.name == "flux2"
    assert all("lora_" in name for name in trained)
    bound = trained_velocity(s.backbone, transformer, s.sigmas, s.cond, s.negative, G, detach_negative=True)
    (bound(s.x, s.node, s.row) * s.u).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in trained.values())


def test_guidance_is_the_formula_and_a_detached_negative_has_no_gradient() -> None:
    """v_neg + g (v_cond - v_neg) by two separate forwards; the trained form has its gradient with v_neg detached."""
    backbone = backbone_named("shapes")
    transformer = backbone.load_transformer(torch.float32)
    table = encode(small_config(Path("runs")), ["a red circle", "two blue squares"])
    cond, negative, sigmas = table.rows([0, 1]), table.negative(2), backbone.sigmas(6, 64, 64)
    x, node, row = torch.randn(2, 8, 8, 8), torch.tensor([1, 4]), torch.tensor([0, 1])
    one, two = (backbone.predict(transformer, x, sigmas[node], c) for c in (cond, negative))
    want = two + 3.0 * (one - two)
    got = full_velocity(backbone, transformer, sigmas, cond, negative, 3.0)(x, node, row)
    assert torch.allclose(got, want, atol=1e-5)
    u = torch.randn_like(x)
    parameter = transformer.proj_out.weight
    wanted = torch.autograd.grad(((two.detach() + 3.0 * (one - two.detach())) * u).sum(), parameter)[0]
    v = trained_velocity(backbone, transformer, sigmas, cond, negative, 3.0, detach_negative=True)(x, node, row)
    assert torch.allclose(torch.autograd.grad((v * u).sum(), parameter)[0], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_qwen_image_s_rollouts_have_no_mask_where_no_row_is_padded(saved: Saved) -> None:
    """Guided or not. Rows of several lengths are masked, and cut to the longest among them; values do not change."""
    s, seen = Setting("qwen_image", saved), []
    hook = s.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    lengths = s.cond["prompt_embeds_mask"].sum(dim=1).tolist()
    empty = int(s.negative["prompt_embeds_mask"][0].sum())
    assert empty < min(lengths) < max(lengths)
    same = {name: tensor[[0, 0]] for name, tensor in s.cond.items()}
    for cond, masked in ((same, False), (s.cond, True)):
        for g, texts in ((1.0, 1), (G, 2)):
            seen.clear()
            got = full_velocity(s.backbone, s.transformer, s.sigmas, cond, s.negative, g)(s.x, s.node, s.row)
            found = [(k["encoder_hidden_states"].shape[1], k["encoder_hidden_states_mask"] is not None) for k in seen]
            longest = max(lengths) if masked else lengths[0]
            assert found == [(longest, masked), (empty, False)][:texts]
            one, two = (s.backbone.predict(s.transformer, s.x, s.sigmas[s.node], c) for c in (cond, s.negative))
            wanted = one if g == 1.0 else s.backbone.guide(one, two, g)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    seen.clear()
    bound = full_velocity(s.backbone, s.transformer, s.sigmas, s.cond, s.negative, 1.0)
    bound(s.x[:1], s.node[:1], s.row[:1])  # as a learner's forward of one row of the batch
    assert [(k["encoder_hidden_states"].shape[1], k["encoder_hidden_states_mask"]) for k in seen] == [
        (lengths[0], None)
    ]
    hook.remove()
