"""What HPSv2.1, PickScore, CLIPScore and the aesthetic score owe alike: slopes, rows on their own, towers, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbp_ray.config import loading
from flowbp_ray.rewards import base
from flowbp_ray.rewards.embedding import TextMemory
from tests.rewards.tiny_clip import (
    PROMPTS,
    clip_model,
    open_clip,
    pictures,
    save_clip,
    save_head,
    save_hps,
    slope_is_the_gradient,
)

NAMES = ["hpsv2", "pickscore", "clipscore", "aesthetic"]
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each reward is configured with."""
    folder = tmp_path_factory.mktemp("weights")
    clip = str(save_clip(folder / "clip", clip_model()))
    head = str(save_head(folder / "head.pth", 16))
    hps = save_hps(open_clip(), folder)
    return {
        "hpsv2": {"path": str(hps), "architecture": "tiny-hps"},
        "pickscore": {"path": clip, "scale": 0.1},
        "clipscore": {"path": clip},
        "aesthetic": {"path": head, "clip": clip},
    }


@pytest.fixture(params=NAMES)
def make(request: pytest.FixtureRequest, options: dict[str, dict[str, Any]]) -> Make:
    """Build one of the rewards, by its registered name."""

    def build(**more: Any) -> Any:
        given = {**options[request.param], **more}
        base.check(request.param, given)
        return base.build(request.param, **given)

    return build


@pytest.mark.parametrize("size", [(48, 48), (20, 37), (32, 32)], ids=str)
def test_the_gradient_is_the_slope_in_fp64(make: Make, size: tuple[int, int]) -> None:
    slope_is_the_gradient(make(dtype="float64"), pictures(2, *size), PROMPTS[:2])


def test_a_row_is_scored_alone(make: Make) -> None:
    """To rounding in another batch; to the bit where only the other rows differ, broken ones too."""
    reward, images = make(), pictures(4, 45, 30)
    together = reward.score(images, PROMPTS)
    assert together.shape == (4,) and together.dtype == torch.float32 and together.std() > 1e-3
    fresh = make()
    alone = torch.cat([fresh.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    others = torch.cat([images[:1], pictures(2, 45, 30, seed=9), torch.full_like(images[:1], torch.nan)])
    changed = reward.score(others, [PROMPTS[0], "else", "where", "a"])
    assert changed[0] == together[0] and not torch.equal(changed[1:3], together[1:3])
    assert torch.isnan(changed[3]) and torch.isfinite(changed[:3]).all()


def test_the_gradient_of_a_row_is_its_own(make: Make) -> None:
    reward, images = make(), pictures(3, 32, 40).requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[:3])[1], images)
    assert gradient[1].abs().max() > 0 and not gradient[[0, 2]].any()


def test_no_image_is_too_odd(make: Make) -> None:
    """Sizes from one pixel up, flat black and white: a finite score and a finite gradient."""
    reward = make()
    for height, width in [(1, 1), (1, 50), (200, 31), (33, 32)]:
        images = torch.stack([torch.zeros(3, height, width), torch.ones(3, height, width)]).requires_grad_(True)
        scores = reward.score(images, ["", "a white wall"])
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert torch.isfinite(scores).all() and torch.isfinite(gradient).all()


def test_towers_in_bfloat16(make: Make) -> None:
    """Near the fp32 ones, with scores and gradients in fp32; the images may be bfloat16 as well."""
    images = pictures(3, 40, 40)
    exact, coarse = make(), make(dtype="bfloat16")
    seen = images.bfloat16().requires_grad_(True)
    found = coarse.score(seen, PROMPTS[:3])
    assert found.dtype == torch.float32 and not torch.equal(found, exact.score(images, PROMPTS[:3]))
    torch.testing.assert_close(found, exact.score(seen.float(), PROMPTS[:3]), rtol=0.05, atol=0.05)
    (gradient,) = torch.autograd.grad(found.sum(), seen)
    assert gradient.dtype == torch.bfloat16 and gradient.abs().max() > 0


def test_nothing_is_trained_and_nothing_drops_out(make: Make) -> None:
    reward, images = make(), pictures(2, 32, 32)
    score = reward.score(images, PROMPTS[:2])
    assert not score.requires_grad  # no weight asks for a gradient
    assert torch.equal(score, reward.score(images, PROMPTS[:2]))


def test_texts_read_in_an_evaluation_serve_in_training(make: Make) -> None:
    """A tensor made in inference mode could not be saved for backward."""
    reward, images = make(), pictures(1, 32, 32)
    with torch.inference_mode():
        reward.score(images, ["a ring"])
    images.requires_grad_(True)
    reward.score(images, ["a ring"]).sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0


def test_bad_calls_say_what_is_wrong(make: Make) -> None:
    reward = make()
    with pytest.raises(ValueError, match=f"{reward.name!r} needs one prompt per image, got 2 and 1"):
        reward.score(torch.zeros(2, 3, 32, 32), ["a"])
    with pytest.raises(ValueError, match="images must be float"):
        reward.score(torch.zeros(1, 32, 32, 3), ["a"])
    with pytest.raises(ValueError, match="images must be float"):
        reward.score(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a"])
    with pytest.raises(ValueError, match=r"options.dtype must be one of float32, bfloat16, float64, got 'float16'"):
        make(dtype="float16")


def test_texts_are_read_once_and_the_oldest_are_forgotten() -> None:
    read: list[str] = []

    def note(text: str) -> torch.Tensor:
        read.append(text)
        return torch.full((2,), float(len(text)))

    memory = TextMemory(note, limit=3)
    assert memory(["a", "bb", "a"]).tolist() == [[1, 1], [2, 2], [1, 1]]
    memory(["ccc", "a"])
    memory(["dddd"])  # the fourth: `bb` was used longest ago
    assert read == ["a", "bb", "ccc", "dddd"] and set(memory.kept) == {"ccc", "a", "dddd"}
    memory(["a", "bb"])
    assert read == ["a", "bb", "ccc", "dddd", "bb"]
    assert memory(list("vwxyz")).shape == (5, 2) and len(memory.kept) == 3  # more at once than are kept


FILES = {
    "hpsv2": ("path", r"HPS_v2\.1_compressed\.pt, from xswu/HPSv2"),
    "pickscore": ("path", "yuvalkirstain/PickScore_v1"),
    "clipscore": ("path", "openai/clip-vit-large-patch14"),
    "aesthetic": ("path", r"sac\+logos\+ava1-l14-linearMSE\.pth"),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_term_asks_for_its_file(name: str, tmp_path: Path) -> None:
    """Resolved as a run's configuration is; a missing file and none at all are one line that says what it is."""
    folder = loading.shipped()
    (tmp_path / "mine.yaml").write_text(f"extends: [{folder}/runs/shapes_refl.yaml, {folder}/rewards/{name}.yaml]\n")
    (term,) = loading.load(tmp_path / "mine.yaml").rewards.terms
    option, file = FILES[name]
    assert term.factory == name and term.options[option] is None
    with pytest.raises(ValueError, match=f"reward '{name}' needs options.{option}: .*{file}") as none:
        base.check(term.factory, term.options)
    with pytest.raises(
        ValueError, match=f"options.{option} is 'no/such', which does not exist; write the path of .*{file}"
    ) as lost:
        base.check(term.factory, {**term.options, option: "no/such"})
    assert "\n" not in str(none.value) + str(lost.value)


def test_the_published_run_asks_for_the_rewards_file() -> None:
    (term,) = loading.load("flux1_flowbp_lagrange").rewards.terms
    with pytest.raises(ValueError, match=r"'hpsv2' needs options.path: .*HPS_v2\.1_compressed\.pt"):
        base.check(term.factory, term.options)
    given = "rewards.terms=[{name: hpsv2, clip: 0.55, options: {path: mine.pt}}]"
    (mine,) = loading.load("flux1_flowbp_lagrange", [given]).rewards.terms
    assert mine.options == {"path": "mine.pt"} and (mine.weight, mine.clip, mine.scale) == (1.0, 0.55, 1.0)
