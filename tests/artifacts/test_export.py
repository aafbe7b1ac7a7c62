"""`flowbp-ray export` on the embedded model: the folder, its card, and how it refuses."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors import safe_open

from flowbp_ray import prompts
from flowbp_ray.artifacts import report
from flowbp_ray.artifacts.card_use import PROMPT, base_name
from flowbp_ray.backbones.registry import backbone_named
from flowbp_ray.config import loading
from flowbp_ray.local import draw
from flowbp_ray.observability.tracker import Tracker
from flowbp_ray.rollout.items import noise_of
from flowbp_ray.run.folder import Run
from flowbp_ray.run.pictures import read_grid
from flowbp_ray.surrogate import METHODS
from flowbp_ray.utils.digest import digest
from tests.artifacts import hub
from tests.artifacts.exporting import drawn, picture_item, trained_run
from tests.limits import files_of_at_most
from tests.small import small_config
from tests.test_cli import call

ADAPTERS = [
    "name=adapters",
    "steps=4",
    "checkpoint={every: 1, keep: 4}",
    "learners.lora={rank: 4, alpha: 6}",
    "learners.ema={decay: 0.5}",
    "learners.optimizer.lr=1e-2",
    "backbone.guidance=2.0",
    "rewards.monitors=[shapes_clip_heldout]",
    "evaluation={prompts: 'shapes:heldout', limit: 6, batch: 6, every: 2, guidance: [1.0, 2.0], num_steps: 3}",
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four steps of adapters with an average, evaluated before the first, after the second and after the fourth."""
    return trained_run(small_config(tmp_path_factory.mktemp("runs"), "flowbp_sparse", *ADAPTERS))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One step of all weights, neither averaged nor evaluated."""
    return trained_run(small_config(tmp_path_factory.mktemp("runs"), "flowbp_sparse", "steps=1", "name=whole"))


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def section(card: str, title: str) -> str:
    return card.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize("options", [["--ema"], ["--ema", "--merge"]], ids=["adapters", "merged"])
def test_the_command_exports_what_sample_draws(
    adapters: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    to = tmp_path / "new" / "out.v1"
    assert call("export", str(adapters.folder), "--to", str(to), *options) == 0
    printed = capsys.readouterr().out
    assert "step 4" in printed and str(to) in printed and "which --ema exports" not in printed
    held = "transformer" if "--merge" in options else "pytorch_lora_weights.safetensors"
    assert sorted(p.name for p in to.iterdir()) == ["README.md", "flowbp_ray.yaml", "images", held]
    assert [p.name for p in to.parent.iterdir()] == ["out.v1"]
    assert loading.load(to / "flowbp_ray.yaml") == adapters.config
    assert drawn(to).size == (64, 64)
    noise = noise_of(picture_item(adapters.config, seed=5), (8, 8, 8))
    _, pictures = draw(adapters, [PROMPT], None, None, seed=5)
    assert np.abs(drawn(to, noise, "np") * 255 - pictures[0]).max() <= 0.51  # rounded to whole numbers
    relation = "finetune" if "--merge" in options else "adapter"
    front = yaml.safe_load(card_of(to).split("---\n")[1])
    assert (front["library_name"], front["base_model_relation"]) == ("diffusers", relation)
    shown = read_grid(adapters.images / "step_000004_guidance_1.png", 64, 64)
    assert [one["output"]["url"] for one in front["widget"]] == [f"images/{i}.png" for i in range(len(shown))]
    texts = [record.text for record in prompts.load("shapes:heldout")[: len(shown)]]
    assert [one["text"] for one in front["widget"]] == texts and len(shown) == 6
    for i, (picture, text) in enumerate(zip(shown, texts, strict=True)):
        with Image.open(to / "images" / f"{i}.png") as opened:
            assert np.array_equal(np.asarray(opened), picture)
        assert f"![](images/{i}.png)" in section(card_of(to), "Pictures") and text in section(card_of(to), "Pictures")
    assert front["base_model"] == "flowbp_ray-shapes" and ("lora" in front["tags"]) == (relation == "adapter")


def test_the_command_pushes_what_it_has_written(
    adapters: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files, to a stand-in for the Hub; the card has a gallery and scores there as well."""
    token = "hf_" + "z9" * 15
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with hub.running() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        more = ["--ema", "--base", "org/base", "--push", "me/mine"]
        assert call("export", str(adapters.folder), "--to", str(tmp_path / "out"), *more) == 0
        printed = capsys.readouterr()
        assert f"pushed: {server.address}/me/mine" in printed.out and token not in printed.out + printed.err
        written = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
        assert server.files == {"me/mine": written} and server.commits == ["adapters, step 4"]
    card = written["README.md"].decode()
    assert "base = 'org/base'  # what was trained from" in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "org/base"
    assert len(front["widget"]) == 6 and front["model-index"] and "images/5.png" in written


def test_all_weights_are_a_folder_that_from_pretrained_takes(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", str(whole.folder), "--to", str(tmp_path)) == 0  # an empty folder is as good as none
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    _, published = whole.checkpoints.weights()
    assert all((p == published[name]).all() for name, p in loaded.named_parameters())
    noise = noise_of(picture_item(whole.config, seed=1), (8, 8, 8))
    _, pictures = draw(whole, [PROMPT], None, None, seed=1)
    assert np.abs(drawn(tmp_path, noise, "np") * 255 - pictures[0]).max() <= 0.51
    card = card_of(tmp_path)
    assert section(card, "Scores").startswith("Not measured") and "| evaluated on | nothing |" in card
    assert json.loads((whole.folder / "summary.json").read_text())["weights_sha256"] in card


def test_a_run_on_gpus_is_exported_and_drawn_without_one(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a penalty, which needs no copy of the base here; the pictures are those of the same weights."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    copied = Run.open(shutil.copytree(whole.folder, tmp_path / "whole"))
    plain = yaml.safe_load((copied.folder / "config.yaml").read_text())
    for pool in ("encoder", "samplers", "rewards"):
        plain[pool]["gpus"] = 1
    plain["learners"]["base_penalty"] = {"weight": 0.5}
    (copied.folder / "config.yaml").write_text(yaml.safe_dump(plain))
    assert copied.config.samplers.device == "cuda"
    assert (draw(copied, [PROMPT], None, None, seed=1)[1][0] == draw(whole, [PROMPT], None, None, seed=1)[1][0]).all()
    assert call("export", str(copied.folder), "--to", str(tmp_path / "out")) == 0
    training = section(card_of(tmp_path / "out"), "Training")
    assert "| distance to the base | penalised with weight 0.5 |" in training
    assert "| staleness | 0; drift not limited |" in training and "sigmas pipeline" in training


def test_an_export_that_fails_leaves_nothing(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with files_of_at_most(1 << 16):
        assert call("export", str(whole.folder), "--to", str(tmp_path / "out")) == 2
    assert capsys.readouterr().err.startswith(f"flowbp-ray: {tmp_path / 'out'}: File too large; ")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert call("export", str(whole.folder), "--to", str(tmp_path / "out")) == 2
    assert not list(tmp_path.iterdir())


def test_the_card_states_the_run_and_its_scores(adapters: Run, tmp_path: Path) -> None:
    """Against the configuration, the prompts' files and summary.json."""
    assert call("export", str(adapters.folder), "--to", str(tmp_path / "out"), "--ema") == 0
    card, config = card_of(tmp_path / "out"), adapters.config
    summary = json.loads((adapters.folder / "summary.json").read_text())
    scores = section(card, "Scores")
    for guidance in ("1", "2"):
        assert f"| guidance {guidance} | before | after | change |" in scores
        for name, *numbers in report.table_rows(summary["guidance"][guidance]):
            trained = " (trained on)" if name == "shapes_clip" else ""
            assert f"| {name}{trained} | {' | '.join(numbers)} |" in scores
    assert "**" not in scores and "3 sampling steps" in scores and "after step 4" in scores
    training = section(card, "Training")
    for argument in inspect.signature(METHODS["flowbp_sparse"]).parameters:
        value = config.method.get(argument, inspect.signature(METHODS["flowbp_sparse"]).parameters[argument].default)
        assert f"{argument}={value!r}" in training
    stated = ["rank 4, alpha 6", "0.01", "guidance 2", "6 steps", "| 4 of 4, 4 images each |", "decay 0.5", "42", "114"]
    assert all(text in training for text in stated)
    texts = [[r.text for r in prompts.load(name)] for name in (config.data.prompts, "shapes:heldout")]
    digest = hashlib.sha256("\n".join(texts[0] + texts[1][:6]).encode()).hexdigest()
    data = section(card, "Data")
    assert all(x in data for x in (f"| number of prompts | {len(texts[0])} |", "| number evaluated on | 6 |", digest))


def test_the_card_says_whose_scores_they_are(adapters: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of another step, of the average, or of nothing after the start; and steps that changed nothing."""
    scores = {}
    for step in range(1, 5):
        assert call("export", str(adapters.folder), "--to", str(tmp_path / str(step)), "--step", str(step)) == 0
        assert "which --ema exports" in capsys.readouterr().out
        scores[step] = section(card_of(tmp_path / str(step)), "Scores")
    assert scores[1].startswith("Not measured")
    assert "They are of step 2, not of the exported weights: step 3 was not" in scores[3]
    assert "was not evaluated" not in scores[2] + scores[4]
    assert all("**The run evaluates the average of its weights" in scores[step] for step in (2, 3, 4))
    copy = Run(Path(shutil.copytree(adapters.folder, tmp_path / "copy")))
    tracker = Tracker(copy.folder, copy.config)
    for step, updated in enumerate([1.0, 0.0, 1.0]):
        tracker.log(step, "train", {"updated": updated})
    tracker.close()
    with (copy.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ki')  # a kill
    (copy.folder / "summary.json").unlink()
    (copy.folder / "prompts.sha256").write_text("0" * 64 + "\n")
    assert call("export", str(copy.folder), "--to", str(tmp_path / "out"), "--step", "3") == 0
    card = card_of(tmp_path / "out")
    assert "3 of 4, 4 images each; 1 of them changed nothing" in card and "| verifier |" in card
    assert "| number of prompts | not known" in card and "0" * 64 in card


def test_the_same_checkpoint_gives_the_same_export(adapters: Run, tmp_path: Path) -> None:
    """Texts byte for byte, tensors, and what the metadata says: safetensors does not order its keys."""
    contents = []
    for name in ("a", "b"):
        assert call("export", str(adapters.folder), "--to", str(tmp_path / name)) == 0
        texts = [(tmp_path / name / file).read_bytes() for file in ("README.md", "flowbp_ray.yaml")]
        with safe_open(tmp_path / name / "pytorch_lora_weights.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            contents.append((texts, file.metadata(), digest(tensors)))
    assert contents[0] == contents[1]
    targets = json.loads(contents[0][1]["lora_adapter_metadata"])["transformer.target_modules"]
    assert targets == sorted(backbone_named("shapes").lora_targets)


def test_what_cannot_be_exported_is_one_line(
    adapters: Run, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = Run.create(small_config(tmp_path, "flowbp_sparse", "name=begun"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    new, before = str(tmp_path / "new"), sorted(tmp_path.rglob("*"))
    cases = {
        "no run in": [str(tmp_path), "--to", new],
        "there are: none": [str(begun.folder), "--to", new],
        "no checkpoint of step 9": [str(whole.folder), "--to", new, "--step", "9"],
        "leave out --ema": [str(whole.folder), "--to", new, "--ema"],
        "leave out --merge": [str(whole.folder), "--to", new, "--merge"],
        "no tool reads adapters of shapes as kohya": [str(adapters.folder), "--to", new, "--format", "kohya"],
        "write one of diffusers, comfyui, kohya": [str(adapters.folder), "--to", new, "--format", "comfy"],
        "write name, or organisation/name": [str(adapters.folder), "--to", new, "--push", "a//b"],
        "write another --to": [str(adapters.folder), "--to", str(tmp_path / "full")],
        "file is there already": [str(adapters.folder), "--to", str(tmp_path / "full" / "file")],
    }
    for expected, arguments in cases.items():
        assert call("export", *arguments) == 2
        message = capsys.readouterr().err.strip()
        assert message.startswith("flowbp-ray: ") and expected in message and len(message.splitlines()) == 1
    assert call("export", str(whole.folder)) == 2 and "--to" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_base_is_called_as_the_hub_calls_it(tmp_path: Path) -> None:
    """A folder by its name, a snapshot in the hub's cache by organisation and model."""
    shipped = backbone_named("shapes").base_folder
    for folder, name in (("my-sd3", "my-sd3"), ("models--org--some-model/snapshots/0123abc", "org/some-model")):
        shutil.copytree(shipped, tmp_path / folder)
        assert base_name(backbone_named("shapes", str(tmp_path / folder))) == name
