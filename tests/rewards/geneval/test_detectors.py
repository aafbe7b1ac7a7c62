"""Detectors and colours of transformers' real classes, against its own image processors and PIL."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    Mask2FormerImageProcessorPil,
    Owlv2ImageProcessorPil,
    OwlViTImageProcessorPil,
)

from flowbp_ray.rewards import preprocess
from flowbp_ray.rewards.geneval import Detection
from flowbp_ray.rewards.geneval.colours import ColourNamer, crop
from flowbp_ray.rewards.geneval.detect import Mask2Former, check_nouns, open_detector
from flowbp_ray.rewards.geneval.names import COLOURS, OBJECTS
from flowbp_ray.rewards.geneval.owl import Owl
from tests.rewards.geneval import tiny

SIZES = [(64, 64), (48, 80), (90, 40), (40, 200)]
ROUNDING = 2e-3  # mean difference, in 0..1, of a path that rounds to 8 bits on the way


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """[3, H, W] of smooth colours in steps of 1/255."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0]
    return (smooth.clamp(0, 1) * 255).round() / 255


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def apart(ours: Tensor, theirs: Tensor, std: tuple[float, ...] | list[float]) -> float:
    """Mean absolute difference of two normalised pictures, in units of 0..1."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs() * torch.tensor(std).view(3, 1, 1)).mean().item()


@pytest.mark.parametrize(
    ("how", "number"), [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)]
)
@pytest.mark.parametrize("size", [(32, 32), (100, 70)])
def test_resizing_is_pils_in_floating_point(how: str, number: Image.Resampling, size: tuple[int, int]) -> None:
    image = picture(48, 80)
    ours = preprocess.resize_clamped(image, *size, how)
    for channel, mine in zip(image.numpy(), ours, strict=True):
        theirs = np.asarray(Image.fromarray(channel, mode="F").resize(size[::-1], number)).clip(0, 1)
        assert np.abs(mine.numpy() - theirs).max() <= 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_mask2former_prepares_as_transformers_does(mask2former: Path, size: tuple[int, int]) -> None:
    image, theirs = picture(*size), Mask2FormerImageProcessorPil.from_pretrained(mask2former)
    expected = theirs(pil(image), return_tensors="pt")["pixel_values"][0]
    assert apart(Mask2Former(mask2former).prepare(image), expected, theirs.image_std) <= ROUNDING


@pytest.mark.parametrize("setting", [{"height": 40, "width": 40}, {"shortest_edge": 50, "longest_edge": 70}])
def test_the_folder_says_how_large(mask2former: Path, setting: dict) -> None:
    image, theirs, ours = picture(48, 80), Mask2FormerImageProcessorPil(size=setting), Mask2Former(mask2former)
    ours.settings = theirs.to_dict()
    expected = theirs(pil(image), return_tensors="pt")["pixel_values"][0]
    assert apart(ours.prepare(image), expected, theirs.image_std) <= ROUNDING


@pytest.mark.parametrize("seed", range(3))
def test_instances_are_those_of_transformers(mask2former: Path, seed: int) -> None:
    """The same logits through both: classes, scores to six digits, masks exactly, and boxes by PIL's getbbox."""
    detector, size = Mask2Former(mask2former), (48, 80)
    with torch.no_grad():
        out = detector.model(pixel_values=detector.prepare(picture(*size, seed=seed))[None])
    found = detector.instances(out.class_queries_logits[0], out.masks_queries_logits[0], size, above=0.1)
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        out, threshold=0.1, target_sizes=[size], return_binary_maps=True
    )[0]
    assert len(found) == len(theirs["segments_info"]) >= 3
    for ours, info, mask in zip(found, theirs["segments_info"], theirs["segmentation"], strict=True):
        assert ours.noun == tiny.NOUNS[info["label_id"]]
        assert ours.score == pytest.approx(info["score"], abs=1e-6)
        assert torch.equal(ours.mask, mask.bool())
        assert ours.box == Image.fromarray(mask.byte().numpy()).getbbox()


def test_a_mask_on_the_pictures_own_grid(mask2former: Path) -> None:
    """One sure query whose logits are positive in one quarter: its box is that quarter, whatever the grid."""
    classes = torch.full((1, 7), -20.0)
    classes[0, 4] = 20.0
    masks = torch.full((1, 8, 8), -5.0)
    masks[0, :4, 4:] = 5.0
    detector = Mask2Former(mask2former)
    (own,) = detector.instances(classes, masks, (64, 64), above=0.8, grid=None)
    (coarse,) = detector.instances(classes, masks, (64, 64), above=0.8)
    assert own.noun == coarse.noun == "dog"
    assert own.box == coarse.box == (32.0, 0.0, 64.0, 32.0)
    assert 0.9 < own.score < torch.sigmoid(torch.tensor(5.0))
    assert detector.instances(classes, masks, (64, 64), above=1.0) == []


def test_finding_is_preparing_the_model_and_its_instances(mask2former: Path) -> None:
    detector, image = open_detector(mask2former, ["dog"]), picture(48, 80)
    assert isinstance(detector, Mask2Former)
    low = detector.find(image, 0.1)
    lowest, *others = sorted({d.score for d in low})  # of random weights, which another release draws otherwise
    between = (lowest + others[0]) / 2
    high = detector.find(image, between)
    assert high == [d for d in low if d.score > between] and 0 < len(high) < len(low)
    assert detector.find(image, 0.1) == low


@pytest.mark.parametrize("size", SIZES[:3])
def test_owlvit_prepares_as_transformers_does(owlvit: Path, size: tuple[int, int]) -> None:
    image, theirs = picture(*size), OwlViTImageProcessorPil.from_pretrained(owlvit)
    expected = theirs(pil(image), return_tensors="pt")["pixel_values"][0]
    assert apart(Owl(owlvit).prepare(image), expected, theirs.image_std) <= ROUNDING


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (20, 20)])
def test_owlv2_prepares_as_transformers_does(owlv2: Path, size: tuple[int, int]) -> None:
    """Theirs mirrors at the outermost half pixel when it enlarges, ours repeats it: the rim is left out there."""
    image, theirs = picture(*size), Owlv2ImageProcessorPil.from_pretrained(owlv2)
    expected = theirs(pil(image), return_tensors="pt")["pixel_values"][0]
    ours = Owl(owlv2).prepare(image)
    rim = slice(1, -1) if size == (20, 20) else slice(None)
    assert apart(ours[:, rim, rim], expected[:, rim, rim].float(), theirs.image_std) <= ROUNDING


@pytest.mark.parametrize("kind", ["owlvit", "owlv2"])
def test_boxes_are_those_of_transformers(kind: str, request: pytest.FixtureRequest) -> None:
    """The same logits and boxes, those of 80 texts asked one by one, through both; ours are cut off at the edges."""
    folder, size = request.getfixturevalue(kind), (48, 80)
    detector, image = open_detector(folder, ["dog", "unicorn"]), picture(48, 80)
    assert isinstance(detector, Owl) and detector.labels == [*OBJECTS, "unicorn"]
    texts = AutoTokenizer.from_pretrained(folder)(
        [f"a photo of a {noun}" for noun in detector.labels], padding="max_length", max_length=32, return_tensors="pt"
    )
    with torch.no_grad():
        out = detector.model(pixel_values=detector.prepare(image)[None], **texts)
    processor = OwlViTImageProcessorPil() if kind == "owlvit" else Owlv2ImageProcessorPil()
    theirs = processor.post_process_object_detection(out, threshold=0.0, target_sizes=[size])[0]
    limit = torch.tensor([80.0, 48.0, 80.0, 48.0])
    expected = []
    for score, label, box in zip(theirs["scores"], theirs["labels"], theirs["boxes"], strict=True):
        left, top, right, bottom = box.clamp(min=0).minimum(limit).tolist()
        if right - left >= 1 and bottom - top >= 1:
            expected.append((detector.labels[label], score.item(), (left, top, right, bottom)))
    found = detector.find(image, 0.0)
    assert len(found) == len(expected) >= 3
    for ours, (noun, score, box) in zip(found, expected, strict=True):
        assert ours.noun == noun and ours.mask is None
        assert ours.score == pytest.approx(score, abs=1e-6)
        assert ours.box == pytest.approx(box, abs=1e-3)


def test_a_class_that_the_detector_lacks_is_named(mask2former: Path, owlv2: Path) -> None:
    with pytest.raises(ValueError, match=r"has no class for 'clock' \(and 1 more\)"):
        check_nouns(mask2former, ["zebra", "dog", "clock"])
    check_nouns(mask2former, ["tv", "airplane", "couch"])
    check_nouns(owlv2, ["anything"])


def test_folders_that_hold_something_else_are_refused(clip: Path, mask2former: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a 'clip'; GenEval's detector is one of mask2former, owlvit, owlv2"):
        check_nouns(clip, [])
    with pytest.raises(ValueError, match=r"has no config\.json"):
        check_nouns(tmp_path, [])
    with pytest.raises(ValueError, match=r"a model of type 'mask2former' and not 'clip'; it should be .*names colours"):
        ColourNamer(mask2former)
    (tmp_path / "config.json").write_text((mask2former / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        check_nouns(tmp_path, [])


def objects(height: int, width: int) -> list[Detection]:
    """With a mask, without one, and with a box between pixels."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[10:30, 5:45] = True
    mask[14:18, 10:20] = False
    return [
        Detection("dog", 0.9, (5.0, 10.0, 45.0, 30.0), mask),
        Detection("dog", 0.8, (20.0, 0.0, 40.0, 48.0)),
        Detection("dog", 0.7, (49.6, 12.4, 79.8, 33.3)),
        Detection("dog", 0.6, (3.0, 3.0, 4.0, 4.0)),
    ]


def test_colours_are_those_of_clips_processor_on_pils_crops(clip: Path) -> None:
    """Crops by PIL (composite on #999, then crop), features by transformers' own calls, one text at a time."""
    image, namer, model = picture(48, 80), ColourNamer(clip), CLIPModel.from_pretrained(clip).eval()
    words, processor = AutoTokenizer.from_pretrained(clip), CLIPImageProcessorPil.from_pretrained(clip)
    weights = []
    with torch.no_grad():
        for colour in COLOURS:
            texts = [
                f"a photo of a {colour} dog",
                f"a photo of a {colour}-colored dog",
                f"a photo of a {colour} object",
            ]
            each = [model.get_text_features(**words(t, return_tensors="pt")).pooler_output[0] for t in texts]
            mean = torch.stack([e / e.norm() for e in each]).mean(0)
            weights.append(mean / mean.norm())
        assert torch.allclose(namer.classifier("dog"), torch.stack(weights), atol=1e-5)
        expected = []
        for one in objects(48, 80):
            shown = pil(image)
            if one.mask is not None:
                grey = Image.new("RGB", shown.size, "#999")
                shown = Image.composite(shown, grey, Image.fromarray(one.mask.numpy()))
            cut = shown.crop(one.box)
            seen = model.get_image_features(**processor(cut, return_tensors="pt")).pooler_output[0]
            assert F.cosine_similarity(namer.features(crop(image, one)), seen, dim=0) > 0.999
            expected.append(COLOURS[int(torch.stack([w @ seen for w in weights]).argmax())])
    assert namer.name(image, "dog", objects(48, 80)) == expected
    assert len(set(expected)) > 1


def test_crops_are_pils(clip: Path) -> None:
    image = picture(48, 80)
    for one in objects(48, 80):
        shown = pil(image)
        if one.mask is not None:
            shown = Image.composite(shown, Image.new("RGB", shown.size, "#999"), Image.fromarray(one.mask.numpy()))
        assert np.array_equal(np.asarray(pil(crop(image, one))), np.asarray(shown.crop(one.box)))


def test_models_can_be_asked_for_in_bfloat16(mask2former: Path, clip: Path) -> None:
    image = picture(48, 80)
    assert Mask2Former(mask2former, dtype=torch.bfloat16).prepare(image).dtype == torch.bfloat16
    full, half = ColourNamer(clip), ColourNamer(clip, dtype=torch.bfloat16)
    assert F.cosine_similarity(full.features(image), half.features(image), dim=0) > 0.99


def test_logits_may_be_given_as_any_object(mask2former: Path) -> None:
    """Equal scores of two queries stay two instances, as in transformers: overlapping is allowed."""
    classes = torch.full((2, 7), -20.0)
    classes[:, 0] = 20.0
    masks = torch.full((2, 8, 8), 5.0)
    out = SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=masks[None])
    theirs = Mask2FormerImageProcessorPil().post_process_instance_segmentation(out, target_sizes=[(16, 16)])[0]
    assert len(Mask2Former(mask2former).instances(classes, masks, (16, 16), 0.5)) == len(theirs["segments_info"]) == 2
