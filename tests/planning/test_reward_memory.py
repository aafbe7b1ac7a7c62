"""What a reward server is planned to hold: published sizes, real allocations on the CPU, and the published runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLModel

from benchmarks.meters import SavedBytes
from flowbp_ray.backbones.base import unit_images
from flowbp_ray.backbones.decoding import PLAIN, Decoding
from flowbp_ray.config import loading
from flowbp_ray.config.rewards import RewardConfig
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.planning import memory, reward_memory
from flowbp_ray.planning.costs import Costs
from flowbp_ray.rewards.clip_folder import image_features, load_clip
from flowbp_ray.rewards.qwen2vl import kept_bytes
from flowbp_ray.rewards.skeleton import VIT_H_14, clip_skeleton, skeleton
from flowbp_ray.utils.units import GIB
from tests.planning.common import CLOSE, backward, config_of, peak_of, write
from tests.planning.test_memory import VAE, VAES
from tests.rewards import tiny_clip
from tests.rewards.published_files import small_qwen

MILLIONS = {"hpsv2": 986, "pickscore": 986, "clipscore": 428, "aesthetic": 428, "image_reward": 447, "hpsv3": 7745}
"""Parameters as docs/rewards.md has them. The aesthetic score loads the whole CLIP model; HPSv3 no lm_head (545 M)."""

QUICK = {"hidden_act": "quick_gelu"}


def published_sd35(folder: Path, run: str, *overrides: str) -> RunConfig:
    """The configurations of SD3.5's size; the transformer, of which nothing here depends, is a small one."""
    write(folder, "transformer", {"_class_name": "SD3Transformer2DModel", "in_channels": 16, "patch_size": 2,
                                  "pos_embed_max_size": 96, "num_layers": 1, "sample_size": 64})  # fmt: skip
    write(folder, "vae", VAE | {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    })  # fmt: skip
    return loading.load(run, [f"backbone.path={folder}", *overrides])


@pytest.mark.parametrize("kind", MILLIONS)
def test_rewards_have_their_published_parameters(kind: str) -> None:
    """With no file of theirs here."""
    found = skeleton(kind, {})
    assert found is not None
    count = memory.elements(found.module)
    assert count / 1e6 == pytest.approx(MILLIONS[kind], rel=0.01)
    assert found.nbytes == count * (2 if kind == "hpsv3" else 4)
    half = skeleton(kind, {"dtype": "bfloat16"})
    assert half is not None and half.nbytes == 2 * count


def test_a_vit_h_takes_what_was_traced_for_it(tmp_path: Path) -> None:
    """3.7 GiB of weights. For 12 images 6.8 GiB with quick GELU, which keeps two factors; its own GELU keeps one."""
    costs = Costs(published_sd35(tmp_path, "sd35_draft_lv"))
    vit = clip_skeleton(None, VIT_H_14, "float32")
    assert vit.nbytes / GIB == pytest.approx(3.67, abs=0.05)
    other = clip_skeleton(None, VIT_H_14 | {"vision_config": VIT_H_14["vision_config"] | QUICK}, "float32")
    assert costs.seeing(("quick",), other, 12, True) / GIB == pytest.approx(6.8, abs=0.2)
    kept = 12 * 32 * 4 * 257 * 1280 * 4  # images, layers, the feed-forward's width by d, tokens, d, fp32
    assert costs.seeing(("h",), vit, 12, True) == pytest.approx(6.8 * GIB - kept, abs=0.2 * GIB)
    assert costs.seeing(("h",), vit, 1, False) < 0.1 * GIB


def test_a_tower_is_a_measured_one(tmp_path: Path) -> None:
    tiny_clip.save_clip(tmp_path, tiny_clip.clip_model())
    model = load_clip("clipscore", tmp_path, "cpu", torch.float32)
    costs, found = Costs(loading.load("shapes_refl")), clip_skeleton(tmp_path, {}, "float32")
    assert memory.elements(found.module) == memory.elements(model) and found.side == tiny_clip.SIDE
    pixels = torch.randn(8, 3, tiny_clip.SIDE, tiny_clip.SIDE, requires_grad=True)
    pixels.grad = torch.zeros_like(pixels)
    work = lambda: backward(lambda: image_features(model, pixels))  # noqa: E731
    work()
    assert costs.seeing(("tiny",), found, 8, True) == pytest.approx(peak_of(work), rel=2 * CLOSE)


def test_what_is_estimated_for_qwen2vl_is_near_what_a_small_one_keeps() -> None:
    """Bytes that its graph saves, without parameters and the pixels, which the first convolution keeps."""
    config = Qwen2VLConfig(**small_qwen())
    model = Qwen2VLModel._from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
    model.to(torch.bfloat16)
    side, words = 16, 60
    ids = torch.full((1, side * side // 4 + words), 5)
    ids[0, : side * side // 4] = config.image_token_id
    pixels = torch.randn(side * side, 3 * 2 * 14 * 14, dtype=torch.bfloat16, requires_grad=True)
    places, grid = torch.arange(ids.shape[1]).expand(3, 1, -1), torch.tensor([[1, side, side]])
    meter, kept = SavedBytes(), []
    meter.measure(
        lambda: kept.append(
            model(input_ids=ids, position_ids=places, pixel_values=pixels, image_grid_thw=grid, use_cache=False)
        )
    )
    parameters = sum(p.nbytes for p in model.parameters() if meter.holders.get(p.untyped_storage().data_ptr()))
    measured = meter.live - parameters - pixels.nbytes
    assert kept_bytes(config, (14 * side) ** 2, words, 2) == pytest.approx(measured, rel=0.25)


HOW = {"plain": PLAIN, "again": Decoding(checkpointing=True), "strips": Decoding(checkpointing=True, tile=16)}


@pytest.mark.parametrize("how", ["again", "strips"])
@pytest.mark.parametrize("name", ["sd35", "qwen_image"])
def test_a_lean_decoder_is_a_measured_one(name: str, how: str, folders: Any, tmp_path: Path) -> None:
    shutil.copytree(folders(name)[1], tmp_path, dirs_exist_ok=True)
    write(tmp_path, "vae", json.loads((tmp_path / "vae" / "config.json").read_text()) | VAES[name])
    costs = Costs(config_of(name, tmp_path))
    empty = costs.backbone.vae_skeleton()
    vae = HOW[how].prepare(type(empty).from_config(empty.config).eval().requires_grad_(False))
    latents = torch.randn(2, *costs.latent_shape, requires_grad=True)
    latents.grad = torch.zeros_like(latents)

    def decode() -> Tensor:
        return unit_images(costs.backbone.decode(vae, latents))

    backward(decode)
    planned = costs.decoding(2, True, HOW[how]).peak
    assert planned < costs.decoding(2, True, PLAIN).peak
    if name == "sd35":  # the CPU's convolutions over time take room of their own
        assert planned == pytest.approx(peak_of(lambda: backward(decode)), rel=2 * CLOSE)


def test_draft_lv_counts_its_reward_and_fits(tmp_path: Path) -> None:
    """All 12 images at once take what made it exceed 80 GB; as published one is decoded at a time."""
    config = published_sd35(tmp_path, "sd35_draft_lv")
    costs = Costs(config)
    sizes = memory.Sizes.of(config, costs)
    role = reward_memory.rewards(config, costs, sizes)
    shares = {(share.name, share.phase): share.nbytes for share in role.shares}
    assert shares["hpsv2 weights", ""] / GIB == pytest.approx(3.67, abs=0.05)
    assert role.nbytes < 12 * GIB
    whole = loading.load("sd35_draft_lv", [f"backbone.path={tmp_path}", *(
        "rewards.micro_batch=12", "rewards.decoder.checkpointing=false", "rewards.precision=float32")])  # fmt: skip
    all_at_once = reward_memory.rewards(whole, costs, sizes)
    assert all_at_once.held("scoring") / GIB == pytest.approx(75.7, rel=0.02) and all_at_once.nbytes > 80 * GIB
    half = loading.load("sd35_draft_lv", [f"backbone.path={tmp_path}", "rewards.precision=bfloat16"])
    assert reward_memory.rewards(half, costs, sizes).held("scoring") < 0.55 * role.held("scoring")


class Bare:
    """A reward of one's own that says nothing of what it holds."""


def test_what_does_not_state_its_model_is_named(folders: Any) -> None:
    config = config_of("sd35", folders("sd35")[1], f"rewards.monitors=[{{name: mine, kind: '{__name__}:Bare'}}]")
    costs = Costs(config)
    assert reward_memory.unstated(config, costs) == ["mine"]
    assert reward_memory.stated(config, RewardConfig(name="hpsv2"), costs) is not None
    away = config.model_copy(update={"rewards": config.rewards.model_copy(update={"url": ["http://there"]})})
    assert reward_memory.unstated(away, costs) == []
    assert reward_memory.rewards(away, costs, memory.Sizes.of(config, costs)).shares == ()
