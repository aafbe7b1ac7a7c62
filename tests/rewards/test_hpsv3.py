"""HPSv3 against transformers' Qwen2-VL, its PIL image processor and a hand-written head; published names; bad files."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from flowbp_ray.rewards import base, build, hpsv3
from flowbp_ray.rewards.hpsv3 import HPSv3, wanted
from flowbp_ray.rewards.preprocess import CLIP_MEAN, CLIP_STD
from flowbp_ray.rewards.qwen2vl import fitted, patches
from tests.rewards.conftest import refuses_what_is_no_picture
from tests.rewards.published_files import QWEN, SPECIAL, drawn, small_qwen, write_qwen

PIXELS = 256 * 28 * 28
QUESTION = "\nHow good is it?  \nAsked for: {text_prompt}\n\nOverall: <|Reward|>\n\nEND\n"
PROMPTS = ["a red cat", "eine Katze über dem Mond, {nothing}"]
REWARD_ID = 256 + len(SPECIAL)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_hpsv3(tmp_path_factory.mktemp("hpsv3"))


def write_hpsv3(folder: Path) -> dict[str, Any]:
    """A small HPSv3.safetensors under the names of transformers 4.45, the backbone's folder and a question."""
    shapes = {name: tuple(t.shape) for name, t in reference().state_dict().items()}
    weights = {}
    for name, value in drawn(shapes, seed=5).items():
        weights[name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")] = value
    head = {"0": (1024, 64), "3": (16, 1024), "5": (2, 16)}
    weights |= drawn({f"rm_head.{i}.weight": shape for i, shape in head.items()}, seed=6)
    weights |= drawn({f"rm_head.{i}.bias": shape[:1] for i, shape in head.items()}, seed=7)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "HPSv3.safetensors")
    (folder / "question.txt").write_text(QUESTION)
    return {
        "path": str(folder / "HPSv3.safetensors"),
        "backbone": str(write_qwen(folder / "qwen")),
        "question": str(folder / "question.txt"),
        "published_question": False,
        "dtype": "float32",
    }


def reference(weights: dict[str, Tensor] | None = None) -> Qwen2VLForConditionalGeneration:
    """transformers' own model of the small configuration, with eager attention."""
    config = Qwen2VLConfig.from_dict(small_qwen() | {"vocab_size": REWARD_ID + 1})
    model = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    if weights is not None:
        renamed = {}
        for name, value in weights.items():
            if not name.startswith("rm_head."):
                new = name.replace("visual.", "model.visual.")
                renamed[new.replace("model.", "model.language_model.", 1) if name.startswith("model.") else new] = value
        model.load_state_dict(renamed)
    return model


def by_transformers(weights: dict[str, Tensor], image: Tensor, prompt: str) -> tuple[Tensor, Tensor]:
    """(pixel values, score) of a uint8-valued image: image processor, whole chat, own forward, plain matrices."""
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})
    seen = processor(Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()), return_tensors="pt")
    tokens = seen["image_grid_thw"].prod().item() // 4
    before, after = QUESTION.split("<|Reward|>")

    def text(words: str) -> list[int]:
        return list(words.encode())  # the small vocabulary is that of single bytes

    start, end, vision, vision_end, pad = (256 + SPECIAL.index(s) for s in SPECIAL[1:6])
    ids = [start, *text("system\nYou are a helpful assistant."), end, *text("\n"), start, *text("user\n")]
    ids += [vision, *[pad] * tokens, vision_end, *text(before.format(text_prompt=prompt)), REWARD_ID, *text(after)]
    ids += [end, *text("\n"), start, *text("assistant\n")]
    model = reference(weights)
    with torch.no_grad():
        states = model.model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            position_ids=torch.arange(len(ids)).expand(3, 1, -1),
            pixel_values=seen["pixel_values"],
            image_grid_thw=seen["image_grid_thw"],
        ).last_hidden_state
        h = states[0, ids.index(REWARD_ID)]
        h = torch.relu(weights["rm_head.0.weight"] @ h + weights["rm_head.0.bias"])
        h = torch.relu(weights["rm_head.3.weight"] @ h + weights["rm_head.3.bias"])
        return seen["pixel_values"], (weights["rm_head.5.weight"] @ h + weights["rm_head.5.bias"])[0]


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Soft random pictures in 0..1 with structure at several scales, on the grid of uint8."""
    rng = np.random.default_rng(seed)
    small = [rng.integers(0, 256, (4, 5, 3), dtype=np.uint8) for _ in range(count)]
    soft = np.stack([np.asarray(Image.fromarray(s).resize((width, height), Image.Resampling.BICUBIC)) for s in small])
    noisy = (soft.astype(int) + rng.integers(-12, 13, soft.shape)).clip(0, 255)
    return torch.from_numpy(noisy).permute(0, 3, 1, 2).float() / 255


def test_equals_transformers_qwen2vl_and_plain_matrices(options: dict[str, Any]) -> None:
    reward = build("hpsv3", **options)
    images = pictures(2, 448, 448)  # the fitted size: nothing is resized, nothing rounded
    weights = load_file(options["path"])
    expected = [by_transformers(weights, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    for image, (pixels, _) in zip(images, expected, strict=True):
        torch.testing.assert_close(patches(image, PIXELS)[0], pixels, rtol=0, atol=1e-5)
    with torch.no_grad():
        scores = reward.score(images, PROMPTS)
        swapped = reward.score(images, PROMPTS[::-1])
    torch.testing.assert_close(scores, torch.stack([s for _, s in expected]), rtol=1e-4, atol=1e-4)
    assert (scores - swapped).abs().min() > 1e-3  # the prompt matters
    assert (scores[0] - reward.score(images[1:], PROMPTS[:1])).abs() > 1e-3  # and so does the image


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 700), (1024, 576)])
def test_pixels_equal_pil(height: int, width: int, dtype: torch.dtype) -> None:
    image = pictures(1, height, width, seed=height)[0]
    rows, columns = fitted(height, width, PIXELS)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})
    mean, std = (np.array(v, dtype=np.float32).reshape(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    how = Image.Resampling.BICUBIC
    resized = np.stack([np.asarray(Image.fromarray(c.numpy(), mode="F").resize((columns, rows), how)) for c in image])
    exact, high, wide = processor.patchify((resized - mean) / std, 14, 2, 2)
    found, grid = patches(image.to(dtype), PIXELS)
    assert grid == (high, wide)
    torch.testing.assert_close(found.float(), torch.from_numpy(exact.copy()), rtol=0, atol=1e-5)
    rounded = processor(Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()), return_tensors="pt")
    assert rounded["image_grid_thw"].tolist() == [[1, high, wide]]
    assert ((found - rounded["pixel_values"]).abs() * std.mean()).mean() <= 2e-3  # in units of 0..1


def test_sizes_follow_the_published_rule() -> None:
    assert [fitted(s, s, PIXELS) for s in (256, 448, 512, 1024)] == [(448, 448)] * 4
    rng = np.random.default_rng(2)
    for height, width in rng.integers(60, 2000, (200, 2)).tolist():
        assert fitted(height, width, PIXELS) == smart_resize(height, width, 28, PIXELS, PIXELS)
    with pytest.raises(ValueError, match="images of 2010 x 10 are too narrow"):
        fitted(2010, 10, PIXELS)


class InDouble(TorchFunctionMode):
    """Makes fp64 of the casts to fp32 inside transformers (RMS norm, rotation), which would hide small differences."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def test_gradient_equals_finite_differences_in_fp64(options: dict[str, Any]) -> None:
    reward = HPSv3(**options | {"dtype": "float64"})
    image = pictures(1, 64, 96).double().requires_grad_(True)
    rng = torch.Generator().manual_seed(1)
    with InDouble():
        reward.score(image, PROMPTS[:1]).sum().backward()
        assert image.grad is not None
        assert all(not p.requires_grad for p in [*reward.model.parameters(), *reward.head.parameters()])
        for _ in range(2):
            way = torch.randn(image.shape, generator=rng, dtype=torch.float64)
            with torch.no_grad():
                ahead, behind = (reward.score(image + s * 1e-5 * way, PROMPTS[:1]) for s in (1, -1))
            assert (image.grad * way).sum().item() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-5)


def test_a_row_is_scored_alone_and_backward_multiplies(options: dict[str, Any]) -> None:
    reward = HPSv3(**options)
    images = pictures(2, 112, 112).requires_grad_(True)
    together = reward.score(images, PROMPTS)
    (pulled,) = torch.autograd.grad((together * torch.tensor([2.0, -0.5])).sum(), images)
    for i, factor in enumerate((2.0, -0.5)):
        alone = images[i].detach().requires_grad_(True)
        score = reward._one(alone, PROMPTS[i])
        torch.testing.assert_close(together[i], score, rtol=1e-6, atol=1e-6)
        (plain,) = torch.autograd.grad(score, alone)
        torch.testing.assert_close(pulled[i], factor * plain, rtol=1e-4, atol=1e-3 * plain.abs().max().item())
    with pytest.raises(ValueError, match="needs one prompt per image, got 2 and 1"):
        reward.score(images, PROMPTS[:1])
    with pytest.raises(ValueError, match=r"cannot read a prompt with <\|Reward\|> in it"):
        reward.score(images[:1].detach(), ["give me <|Reward|>"])


def test_bfloat16_rounds_the_rotary_tables_as_published_and_keeps_the_head(options: dict[str, Any]) -> None:
    reward = HPSv3(**options | {"dtype": "bfloat16"})
    table = reward.model.language_model.rotary_emb.inv_freq
    exact = torch.tensor([1e6 ** (-2 * i / 16) for i in range(8)])
    assert torch.equal(table, exact.bfloat16())
    assert {p.dtype for p in reward.head.parameters()} == {torch.float32}
    image = pictures(1, 112, 112).requires_grad_(True)
    score = reward.score(image, PROMPTS[:1])
    score.sum().backward()
    assert score.dtype == torch.float32 and image.grad is not None and image.grad.abs().sum() > 0
    with torch.no_grad():
        assert score.item() == pytest.approx(HPSv3(**options).score(image, PROMPTS[:1]).item(), rel=0.1, abs=0.3)


def test_the_published_model_has_these_names_and_sizes() -> None:
    """Qwen2-VL-7B on the meta device: the names of transformers 4.45, the 8,291,375,616 parameters of its card."""
    config = Qwen2VLConfig.from_dict(QWEN)
    shapes = wanted(config)
    names = {f"visual.{n}" for n in ("patch_embed.proj.weight", "merger.ln_q.weight", "merger.ln_q.bias")}
    names |= {f"visual.merger.mlp.{i}.{end}" for i in (0, 2) for end in ("weight", "bias")}
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names |= {f"visual.blocks.{i}.{p}.{end}" for i in range(32) for p in parts for end in ("weight", "bias")}
    names |= {"model.embed_tokens.weight", "model.norm.weight"}
    for i in range(28):
        layer = f"model.layers.{i}."
        names |= {f"{layer}self_attn.{p}_proj.{end}" for p in "qkv" for end in ("weight", "bias")}
        names |= {f"{layer}self_attn.o_proj.weight", f"{layer}input_layernorm.weight"}
        names |= {f"{layer}mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
        names.add(f"{layer}post_attention_layernorm.weight")
    head = {f"rm_head.{i}.{end}" for i in (0, 3, 5) for end in ("weight", "bias")}
    assert set(shapes) == names | head and len(shapes) == 729 + 6
    counted = sum(math.prod(shape) for name, shape in shapes.items() if name in names)
    assert counted + 152064 * 3584 == 8_291_375_616  # with the lm_head, which the score leaves out
    assert shapes["rm_head.0.weight"] == (1024, 3584) and shapes["rm_head.5.bias"] == (2,)
    config.text_config.vocab_size = 151658  # Qwen2-VL's 151,657 words and <|Reward|>, as published
    assert wanted(config)["model.embed_tokens.weight"] == (151658, 3584)


def test_the_question_is_read_from_the_authors_file_without_running_it(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instruction, end = "\nHow good is it?  \nAsked for: {text_prompt}\n\n", "Overall: <|Reward|>\n\nEND\n"
    assert instruction + end == QUESTION
    (tmp_path / "theirs.py").write_text(
        f"import not_installed\nraise SystemExit\nINSTRUCTION = {instruction!r}\nOTHER = 3\n"
        f"prompt_with_special_token = {end!r}\nprompt_without_special_token = 'x'\n"
    )
    assert hpsv3.read_question(tmp_path / "theirs.py") == QUESTION
    strict = {k: v for k, v in options.items() if k != "published_question"} | {"question": str(tmp_path / "theirs.py")}
    with pytest.raises(ValueError, match=r"theirs.py is not the published one.*or write published_question: false"):
        base.check("hpsv3", strict)
    monkeypatch.setattr(hpsv3, "QUESTION_SHA256", hashlib.sha256(QUESTION.encode()).hexdigest())
    base.check("hpsv3", strict)
    (tmp_path / "stripped.txt").write_text(QUESTION.replace("  \n", "\n"))
    with pytest.raises(ValueError, match=r"stripped.txt is not the published one, to which blanks at line ends belong"):
        base.check("hpsv3", strict | {"question": str(tmp_path / "stripped.txt")})


def test_missing_and_foreign_files_are_refused_before_anything_starts(options: dict[str, Any], tmp_path: Path) -> None:
    base.check("hpsv3", options)
    (tmp_path / "text.safetensors").write_text("not weights")
    (tmp_path / "other.py").write_text("INSTRUCTION = '{text_prompt}'")
    (tmp_path / "mute.txt").write_text("{text_prompt}")
    bare = tmp_path / "bare"
    bare.mkdir()
    tokenless = tmp_path / "tokenless"
    tokenless.mkdir()
    (tokenless / "config.json").write_text(json.dumps(small_qwen()))
    weights = load_file(options["path"])
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != key}, tmp_path / "less.safetensors")
    save_file(weights | {"model.extra": torch.zeros(1)}, tmp_path / "more.safetensors")
    save_file(weights | {"model.embed_tokens.weight": torch.zeros(304, 64)}, tmp_path / "wide.safetensors")
    for change, match in (
        ({"path": None}, "needs options.path: HPSv3.safetensors"),
        ({"path": str(tmp_path / "no")}, "no', which does not exist; write the path of HPSv3.safetensors"),
        ({"path": str(tmp_path / "text.safetensors")}, "text.safetensors cannot be read as safetensors"),
        (
            {"path": str(tmp_path / "less.safetensors")},
            rf"less.safetensors does not .*: it lacks 1 of \d+ tensors \({key}, …\); it should be HPSv3.safetensors",
        ),
        ({"path": str(tmp_path / "more.safetensors")}, r"it has 1 others \(model.extra, …\); it should be"),
        ({"path": str(tmp_path / "wide.safetensors")}, r"embed_tokens.weight is \(304, 64\), not \(264, 64\)"),
        ({"backbone": str(bare)}, "no tokenizer in .*bare"),
        ({"backbone": str(tokenless)}, "the tokenizer in .*tokenless is not Qwen2-VL's"),
        ({"question": None}, "needs options.question: the question HPSv3 was trained with"),
        ({"question": str(tmp_path / "other.py")}, "does not define INSTRUCTION and prompt_with_special_token"),
        (
            {"question": str(tmp_path / "mute.txt")},
            r"must contain <\|Reward\|> once, and does 0 times; write the question",
        ),
        ({"question": str(bare)}, "bare cannot be read"),
        ({"dtype": "int4"}, "options.dtype must be one of .* got 'int4'"),
    ):
        with pytest.raises(ValueError, match=match) as caught:
            base.check("hpsv3", options | change)
        assert "\n" not in str(caught.value)
    save_file(weights | {key: weights[key] * float("inf")}, tmp_path / "inf.safetensors")
    broken = options | {"path": str(tmp_path / "inf.safetensors")}
    for refusing in (lambda: base.check("hpsv3", broken), lambda: HPSv3(**broken)):
        with pytest.raises(ValueError, match=f"{key} in .*inf.safetensors has values that are not finite"):
            refusing()


def test_pictures_of_another_type_are_refused(options: dict[str, Any]) -> None:
    refuses_what_is_no_picture(build("hpsv3", **options))
