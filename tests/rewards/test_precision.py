"""`rewards.precision` and `rewards.micro_batch` in the process that scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flowbp_ray.config import loading
from flowbp_ray.config.rewards import RewardsConfig
from flowbp_ray.messages import pack, unpack
from flowbp_ray.rewards.base import factory
from flowbp_ray.rewards.hpsv2 import HPSv2
from flowbp_ray.rewards.precision import computing, with_dtype
from flowbp_ray.rewards.scorer import Scorer
from tests.rewards.remote.servers import item, report
from tests.small import scorer_of, small_config

PROMPTS = ["a red circle", "a blue square", "a green circle", "a red square", "a blue circle"]


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("before", [(False, True), (False, False), (True, True)])
def test_tf32_is_for_all_products_or_for_none_and_afterwards_as_before(
    before: tuple[bool, bool],
) -> None:
    """PyTorch's own default is (False, True): neither exact nor fast."""
    found = flags()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    for precision, expected in (("float32", False), ("tf32", True), ("bfloat16", False)):
        with pytest.raises(KeyError), computing(precision):  # type: ignore[arg-type]
            assert flags() == (expected, expected)
            raise KeyError
        assert flags() == before
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = found


def test_rewards_are_built_in_bf16_unless_their_options_say_otherwise() -> None:
    assert with_dtype(HPSv2, {"path": "x"}, "bfloat16") == {"path": "x", "dtype": "bfloat16"}
    assert with_dtype(HPSv2, {"dtype": "float32"}, "bfloat16") == {"dtype": "float32"}
    assert with_dtype(HPSv2, {}, "float32") == with_dtype(HPSv2, {}, "tf32") == {}
    assert with_dtype(lambda device="cpu": None, {}, "bfloat16") == {}  # one of one's own that takes none
    kinds = ("aesthetic", "clipscore", "geneval", "hpsv3", "image_reward", "pickscore", "shapes_clip")
    assert all("dtype" in with_dtype(factory(kind), {}, "bfloat16") for kind in kinds)


def test_null_is_one_image_where_images_are_large() -> None:
    term = {"name": "shapes_clip"}
    by_default, three = (RewardsConfig.model_validate({"terms": [term], **more}) for more in ({}, {"micro_batch": 3}))
    assert by_default.at_once(12, 256, 256) == 12 and by_default.at_once(12, 256, 272) == 1
    assert three.at_once(12, 64, 64) == three.at_once(12, 1024, 1024) == 3 and three.at_once(2, 64, 64) == 2


def rewarded(tmp_path: Path, *overrides: str) -> Scorer:
    return scorer_of(small_config(tmp_path, "draft_lv", "rewards.monitors=[shapes_clip_heldout]", *overrides))


def test_evaluations_are_scored_in_micro_batches(tmp_path: Path) -> None:
    """Any size gives the same scores and pictures, a latent that is not finite among them; so do a gate's pictures."""
    latents = torch.randn(5, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    latents[3, 0, 0, 0] = torch.nan
    whole, seen = None, []
    for overrides in ([], ["rewards.micro_batch=1"], ["rewards.micro_batch=2"]):
        scorer = rewarded(tmp_path, *overrides)
        plain = scorer.decode
        scorer.decode = lambda z, plain=plain: (seen.append(len(z)), plain(z))[1]
        found, pictures = (
            scorer.evaluate(item((0, 1, 2, 3, 4)), PROMPTS, pack(latents)),
            scorer.pictures(pack(latents[:, None])),
        )
        assert found.drawn == (True, True, True, False, True) and found.images.shape == (5, 64, 64, 3)
        assert all(np.isnan(found.scores[name][3]) for name in ("shapes_clip", "shapes_clip_heldout"))
        if whole is None:
            whole = found, pictures
            continue
        for name, scores in whole[0].scores.items():
            np.testing.assert_allclose(found.scores[name], scores, atol=1e-5)
        assert np.abs(found.images.astype(int) - whole[0].images).max() <= 1
        assert np.abs(pictures.astype(int) - whole[1]).max() <= 1
    assert seen == [5, 5, *[1] * 10, *[2, 2, 1] * 2]


def test_what_is_trained_on_is_near_in_bf16_and_the_same_with_less_memory(tmp_path: Path) -> None:
    """The cotangent of draft_lv's branches: bits with checkpointing, rounding with strips, a few percent with bf16."""
    target = torch.randn(2, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    def found(*overrides: str) -> torch.Tensor:
        return unpack(rewarded(tmp_path, *overrides).score(item((0, 1)), PROMPTS[:2], report(), pack(target))[1])

    plain = found()
    assert torch.equal(found("rewards.decoder.checkpointing=true", "rewards.precision=tf32"), plain)
    assert float((found("rewards.decoder.tile=20") - plain).norm() / plain.norm()) < 1e-4
    assert 0 < float((found("rewards.precision=bfloat16") - plain).norm() / plain.norm()) < 0.1


def test_the_published_runs_say_how_rewards_compute() -> None:
    config = loading.load("flux1_flowbp_sparse")
    assert config.rewards.precision == "tf32" and config.rewards.decoder.checkpointing
