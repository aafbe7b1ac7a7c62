"""What `init` writes loads, is what was asked for, and extends what is shipped for that card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowbp_ray.config import loading
from flowbp_ray.starting.scaffold import CARDS, FILES, Wish, asked, family_of, write
from flowbp_ray.surrogate.methods import METHODS

CLASSES = {"sd35": "StableDiffusion3Pipeline", "flux1": "FluxPipeline", "flux2": "Flux2KleinPipeline"}


def folder(tmp_path: Path, kind: str) -> str:
    """A diffusers folder, as far as `init` reads it."""
    model = tmp_path / f"a folder of {kind}"
    model.mkdir()
    (model / "model_index.json").write_text(json.dumps({"_class_name": kind, "vae": ["diffusers", "AutoencoderKL"]}))
    return str(model)


@pytest.mark.parametrize(("family", "gb"), [*CARDS, ("flux1", 80), ("sd35", 0), ("flux1", 0), ("flux2", 0)])
def test_a_file_for_each_family_and_card_loads_and_is_what_was_asked_for(tmp_path: Path, family: str, gb: int) -> None:
    model, file = folder(tmp_path, CLASSES[family]), tmp_path / "mine.yaml"
    lines = write(file, Wish("mine", model, "flowbp_bridge", "pickscore", "my prompts.txt", gb))
    config = loading.load(file)
    assert config.backbone.name == family and config.backbone.path == model and config.name == "mine"
    assert (config.method or {})["name"] == "flowbp_bridge" and config.data.prompts == "my prompts.txt"
    assert [(t.name, t.options["path"]) for t in config.rewards.terms] == [("pickscore", "PickScore_v1")]
    assert (config.learners.lora is None) == (gb == 0) and bool(config.cluster.colocate) == (gb > 0)
    assert lines[-1] == f"flowbp-ray train {file}"
    assert any(("8x80GB" if not gb else f"1x{gb}GB") in line for line in lines)
    assert sum(line.startswith("#") for line in file.read_text().splitlines()) >= 8


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("reward", sorted(FILES))
def test_every_method_and_reward(tmp_path: Path, method: str, reward: str) -> None:
    file = tmp_path / "mine.yaml"
    write(file, Wish("mine", folder(tmp_path, "FluxPipeline"), method, reward, "p.txt", 24))
    config = loading.load(file)
    assert (config.method or {})["name"] == method and config.rewards.terms[0].clip == FILES[reward][1]
    small = tmp_path / "small.yaml"
    write(small, Wish("small", "shapes", method, "", "", 0))
    assert loading.load(small).backbone.name == "shapes"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "flowbp_spars"}, "flowbp_sparse"),
        ({"reward": "hps"}, "hpsv2"),
        ({"gb": 8}, "flux1 from 24 GB"),
        ({"model": "nowhere"}, "nowhere is no folder as save_pretrained writes it"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file, model = tmp_path / "mine.yaml", folder(tmp_path, "FluxPipeline")
    given = {"name": "mine", "model": model, "method": "refl", "reward": "hpsv2", "prompts": "p", "gb": 24} | change
    with pytest.raises(ValueError, match=said):
        write(file, Wish(**given))
    assert not file.exists()
    file.write_text("mine\n")
    with pytest.raises(ValueError, match="is there already"):
        write(file, Wish("mine", model, "refl", "hpsv2", "p", 24))
    with pytest.raises(ValueError, match="supported are"):
        family_of(folder(tmp_path, "WanPipeline"))


def test_what_is_not_given_is_asked_or_named() -> None:
    questions: list[str] = []

    def answer(question: str, default: str) -> str:
        questions.append(question)
        return default

    nothing = dict.fromkeys(("model", "method", "reward", "prompts", "gb"))
    assert asked({"name": "a", **nothing, "model": "m"}, answer) == Wish(
        "a", "m", "flowbp_sparse", "hpsv2", "prompts.txt", 24
    )
    assert len(questions) == 4
    assert asked({"name": "a", **nothing}, answer) == Wish("a", "shapes", "flowbp_sparse", "", "", 0)
    with pytest.raises(ValueError, match="--method is missing"):
        asked({"name": "a", **nothing, "model": "shapes"}, None)
    with pytest.raises(ValueError, match="--prompts is not for the model shapes"):
        asked({"name": "a", **nothing, "model": "shapes", "prompts": "p.txt"}, answer)


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    given = {"model": "shapes", "method": "refl", "reward": None, "prompts": None, "gb": None}
    file = tmp_path / "my run: yes # 1.yaml"
    write(file, asked({"name": file.stem, **given}, None))
    assert loading.load(file).name == "my_run_yes_1"
