"""`flowbp-ray encode`, several at a time; and what travels with the items of a step once prompts are encoded."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbp_ray import prompts
from flowbp_ray.backbones.embeddings import EMPTY, PackedEmbeddings
from flowbp_ray.backbones.shapes import ShapesBackbone
from flowbp_ray.cli import app
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.local import LocalLoop, encode, fill_cache
from flowbp_ray.messages import Item, RolloutReport, Scored
from flowbp_ray.observability.step_metrics import travel
from flowbp_ray.run.folder import comparable, differences
from flowbp_ray.utils.console import guarded
from flowbp_ray.weights.packing import PackedTensors
from tests.paths import ROOT
from tests.small import short_prompts, small_config


def started(*arguments: str) -> subprocess.Popen[str]:
    """`flowbp-ray encode` in a process of its own."""
    command = [sys.executable, "-m", "flowbp_ray", "encode", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def counts(output: str) -> list[int]:
    """[distinct, were there, encoded] as printed."""
    found = re.search(r"(\d+) distinct prompts, [\d.]+ MiB: (\d+) were there, (\d+) encoded", output)
    assert found, output
    return [int(number) for number in found.groups()]


@pytest.mark.slow
def test_two_processes_fill_one_cache_and_another_finds_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [record.text for record in prompts.load("shapes:train")][:150]
    (tmp_path / "prompts.txt").write_text("\n".join([*texts, *texts[:50]]) + "\n")
    settings = [f"data.prompts={tmp_path}/prompts.txt", "evaluation.prompts=null", f"encoder.cache={tmp_path}/cache"]
    both = [started("shapes_refl", *settings) for _ in range(2)]
    for code, output in [ended(process) for process in both]:
        assert code == 0 and counts(output)[0] == 151 and str(tmp_path / "cache") in output
    with pytest.raises(SystemExit) as stop:
        guarded(lambda: app(["encode", "shapes_refl", *settings]))
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert counts(output) == [151, 151, 0] and "100%" in output
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 151
    assert not list((tmp_path / "cache").rglob("*.partial"))
    fresh = encode(small_config(tmp_path, "refl", "encoder.cache=null"), texts)
    monkeypatch.setattr(ShapesBackbone, "load_encoder", None)  # what was filled is all that is read
    cached = encode(small_config(tmp_path, "refl", *settings), texts)
    assert cached.prompts.keys() == fresh.prompts.keys()
    everything = range(len(texts))
    for name, tensor in fresh.rows(everything).items():
        assert torch.equal(cached.rows(everything)[name], tensor)


def test_each_prompt_has_the_bits_that_it_has_alone() -> None:
    """Those of the embedded model's own encoder, one at a time: 64 at a time they are only close."""
    from flowbp_ray.shapes import text

    tokenizer, model = text.load_text()
    texts = [record.text for record in prompts.load("shapes:train")][:64]
    _, together = text.encode_prompts(texts, tokenizer, model)
    alone = torch.cat([text.encode_prompts([one], tokenizer, model)[1] for one in texts])
    assert torch.allclose(alone, together, atol=1e-5)
    table = encode(small_config(Path("runs"), "refl", "encoder.cache=null"), texts)
    assert torch.equal(table.rows(range(64))["pooled_prompt_embeds"], alone)


def test_of_107515_prompts_those_of_the_steps_are_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps of four, and the empty one, however long the file is."""
    held = {}
    for count in (64, 107_515):
        settings = [f"data.prompts={short_prompts(tmp_path, count)}", f"encoder.cache={tmp_path}/of_{count}"]
        loop = LocalLoop(small_config(tmp_path, "refl", *settings))
        drawn = {i for item in (*loop.items(0), *loop.items(1)) for i in item.prompt_ids}
        assert set(loop.learner.embeddings.prompts) == {EMPTY, *drawn}
        held[count] = PackedEmbeddings.of(loop.learner.embeddings).nbytes
        small = ["steps=2", "data.prompts_per_step=4", "data.rollout_batch=2", "learners.micro_batch=2"]
        with pytest.raises(SystemExit):
            guarded(lambda given=(*settings, *small): app(["encode", "shapes_refl", "evaluation.prompts=null", *given]))
        assert counts(capsys.readouterr().out) == [9, 9, 0]
    assert held[64] == held[107_515] == 9 * 4 * (14 * 128 + 128)


def test_another_cache_is_no_other_run(tmp_path: Path) -> None:
    one = comparable(small_config(tmp_path))
    other = small_config(tmp_path, "flowbp_sparse", "encoder={cache: null, threads: 2, cpus: 1}")
    assert differences(one, comparable(other)) == []
    on_gpu = small_config(tmp_path, "flowbp_sparse", "encoder.gpus=1")
    assert differences(one, comparable(on_gpu)) == ['encoder.gpus was 0, is "above 0"']
    assert small_config(tmp_path, "flowbp_sparse", "encoder.cache=here").encoder.cache == str(Path("here").absolute())


class Step:
    """The real messages of a step in one process."""

    def __init__(self, loop: LocalLoop, step: int) -> None:
        published = [PackedTensors.of(loop.learner.engine.weights())]
        self.items: list[Item] = loop.items(step)
        self.reports: list[RolloutReport] = []
        self.scored: list[Scored] = []
        self.pickled: list[bytes] = []
        self.tensors = 0  # bytes of states, targets and cotangents
        for item in self.items:
            report, rollout, target = loop.sampler.rollout(item, lambda: published)
            texts = [loop.texts[i] for i in item.prompt_ids]
            scored, cotangent = loop.scorer.score(item, texts, report, target)
            self.reports.append(report)
            self.scored.append(scored)
            self.pickled += [pickle.dumps(message, 5) for message in (item, rollout, report, target, scored, cotangent)]
            self.tensors += rollout.states.nbytes + target.nbytes + cotangent.nbytes

    @property
    def rows(self) -> int:
        return sum(item.rows for item in self.items)

    def metrics(self) -> dict[str, float]:
        return travel(self.reports, self.scored)


def loop_of(tmp_path: Path, images_per_prompt: int) -> LocalLoop:
    """Four rows a step, of four prompts or of one."""
    config: RunConfig = small_config(
        tmp_path,
        "flowbp_sparse",
        f"data.prompts_per_step={4 // images_per_prompt}",
        f"data.images_per_prompt={images_per_prompt}",
    )
    loop = LocalLoop(config)
    loop.sampler.hold(["all"], lambda keys: [PackedEmbeddings.of(loop.learner.embeddings)])  # as a sampler on Ray
    return loop


def test_what_travels_is_independent_of_the_images_per_prompt_and_holds_no_embedding(tmp_path: Path) -> None:
    measured: dict[int, dict[str, float]] = {}
    for images in (1, 4):
        loop = loop_of(tmp_path, images)
        first, second = Step(loop, 0), Step(loop, 1)
        assert [len({*second.items[0].prompt_ids}), second.rows] == [2 if images == 1 else 1, 4]
        table: Any = loop.learner.embeddings
        one_prompt = sum(tensor.nbytes for tensor in table.negative(1).values())
        for step in (first, second):
            blob = b"".join(step.pickled)
            assert (
                len(blob) - step.tensors < one_prompt
            )  # all messages but their tensors, against one prompt's embedding
            for item in step.items:
                for tensor in table.rows(item.prompt_ids).values():
                    assert tensor[0].flatten()[-16:].numpy().tobytes() not in blob
        assert (
            first.metrics()["embedding_bytes"] == PackedEmbeddings.of(table).nbytes
        )  # once, when they are handed over
        assert second.metrics()["embedding_bytes"] == 0
        measured[images] = second.metrics()
    for name in ("state", "velocity", "target", "cotangent"):
        assert measured[1][f"{name}_bytes_per_image"] == measured[4][f"{name}_bytes_per_image"]
    latent = 8 * 8 * 8 * 4
    assert measured[4]["state_bytes_per_image"] == 4 * latent  # K = 4
    assert measured[4]["travel_bytes_per_image"] == pytest.approx(6 * latent + measured[4]["item_bytes_per_image"])
    # an item's numbers are pickled in one to three bytes each
    assert abs(measured[1]["item_bytes_per_image"] - measured[4]["item_bytes_per_image"]) <= 3 * 8


def test_weights_travel_once_per_version(tmp_path: Path) -> None:
    loop = loop_of(tmp_path, 1)
    whole = sum(loop.learner.engine.sizes().values())
    assert [report.weight_bytes for report in Step(loop, 0).reports] == [whole, 0]


def test_encoding_on_a_gpu_that_is_not_there_says_what_to_write(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"there is no GPU here; write encoder.gpus=0"):
        fill_cache(small_config(tmp_path, "flowbp_sparse", "encoder.gpus=1"), ["a red circle"])
