"""`flowbp-ray sample`: seeds, a negative prompt, sheets and files, and what a PNG says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowbp_ray.local import draw
from flowbp_ray.run.folder import Run
from flowbp_ray.run.pictures import read_grid
from tests.artifacts.exporting import drawn as drawn_by_diffusers
from tests.artifacts.exporting import trained_run
from tests.small import small_config
from tests.test_cli import call

PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = small_config(tmp_path_factory.mktemp("runs"), "flowbp_sparse", "steps=1", "name=mine")
    return trained_run(config)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


def test_files_hold_a_picture_and_all_that_draws_it_again(run: Run, tmp_path: Path) -> None:
    """Against pictures that are drawn from one seed, and by the settings that the file names."""
    to, prompts = tmp_path / "new" / "samples", [option for prompt in PROMPTS for option in ("-p", prompt)]
    assert call("sample", str(run.folder), *prompts, "--n", "2", "--seed", "7", "--files", "-o", str(to)) == 0
    assert sorted(p.name for p in to.iterdir()) == [f"{place:03d}_seed{s}.png" for place in (0, 1) for s in (7, 8)]
    for seed in (7, 8):
        for place, picture in enumerate(draw(run, PROMPTS, None, None, seed)[1]):
            file = to / f"{place:03d}_seed{seed}.png"
            assert np.array_equal(pixels(file), picture)
            with Image.open(file) as opened:
                said, line = json.loads(opened.info["flowbp_ray"]), opened.info["parameters"]
            assert (said["prompt"], said["seed"], said["place"]) == (PROMPTS[place], seed, place)
            assert (said["num_steps"], said["step"], said["run"], said["width"]) == (6, 1, "mine", 64)
            assert said["weights_sha256"] == json.loads((run.folder / "summary.json").read_text())["weights_sha256"]
            assert line.startswith(f"{PROMPTS[place]}\nSteps: 6, Sampler: Euler, CFG scale: ")
            assert f"Seed: {seed}, Size: 64x64" in line and "Negative prompt" not in line


def test_a_sheet_has_the_pictures_of_a_prompt_beside_each_other(run: Run, tmp_path: Path) -> None:
    sheet, prompts = tmp_path / "sheet.png", [option for prompt in PROMPTS for option in ("-p", prompt)]
    assert call("sample", str(run.folder), *prompts, "--seed", "3", "--seed", "1", "--seed", "2", "-o", str(sheet)) == 0
    by_seed = [draw(run, PROMPTS, None, None, seed)[1] for seed in (3, 1, 2)]
    assert np.array_equal(read_grid(sheet, 64, 64, columns=3), [row[i] for i in (0, 1) for row in by_seed])
    with Image.open(sheet) as opened:
        said = json.loads(opened.info["flowbp_ray"])
    assert said["prompts"] == PROMPTS and said["seeds"] == [3, 1, 2]


def test_a_negative_prompt_is_that_of_diffusers(run: Run, tmp_path: Path) -> None:
    """The same picture as diffusers' pipeline draws with the text in the place of the empty one."""
    from flowbp_ray.rollout.items import noise_of
    from tests.artifacts.exporting import picture_item

    chosen = ["-p", "a red circle", "--seed", "5", "--guidance", "2"]
    for name, more in (("plain", []), ("without", ["--negative", "a red square"])):
        assert call("sample", str(run.folder), *chosen, *more, "--files", "-o", str(tmp_path / name)) == 0
    ours = pixels(tmp_path / "without" / "000_seed5.png")
    assert not np.array_equal(ours, pixels(tmp_path / "plain" / "000_seed5.png"))
    with Image.open(tmp_path / "without" / "000_seed5.png") as opened:
        assert "\nNegative prompt: a red square\nSteps" in opened.info["parameters"]
    assert call("export", str(run.folder), "--to", str(tmp_path / "out")) == 0
    card = tmp_path / "out" / "README.md"
    text = card.read_text()
    assert text.count("('a red circle', \"\")") == 1 and text.count("guidance_scale=") == 1
    used = text.split("guidance_scale=")[1].split(",")[0]
    text = text.replace("('a red circle', \"\")", "('a red circle', 'a red square')")
    card.write_text(text.replace(f"guidance_scale={used}", "guidance_scale=2.0"))
    noise = noise_of(picture_item(run.config, seed=5), (8, 8, 8))
    with torch.no_grad():
        theirs = drawn_by_diffusers(tmp_path / "out", noise, "np")
    assert np.abs(theirs * 255 - ours).max() <= 0.51  # rounded to whole numbers


def test_what_cannot_be_drawn_is_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for expected, options in {
        "guidance 1 has no negative branch; leave it out, or write --guidance 3": [
            "--negative",
            "a",
            "--guidance",
            "1",
        ],
        "--n counts from one --seed": ["--n", "2", "--seed", "1", "--seed", "2"],
        "--seed must be 0 or more": ["--seed", "-1"],
        "-o is a folder; write -o": ["--files", "-o", str(tmp_path / "a.png")],
        "is a file, not a folder": ["--files", "-o", str(tmp_path / "file")],
        "is a folder; write the name of a picture": ["-o", str(tmp_path)],
    }.items():
        assert call("sample", str(run.folder), "-p", "a red circle", *options) == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith("flowbp-ray: ") and expected in message and len(message.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
