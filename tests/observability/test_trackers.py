"""Trackers on real files: what they hold, and that a run that goes on continues its curve.

TensorBoard and MLflow are extras; without them their tests are skipped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.evaluation.estimates import Evaluation
from flowbp_ray.observability.destinations import LARGEST, reduced
from flowbp_ray.observability.mlflow_run import allowed
from flowbp_ray.observability.tracker import Tracker
from flowbp_ray.preflight import check_trackers
from flowbp_ray.run.pictures import grid
from flowbp_ray.utils.addresses import free_port
from tests.small import small_config

PROMPTS = ["a red circle", "zwei blaue Quadrate, größer"]
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
CRASHED, RESUMED = 1.0, 2.0
"""The loss that is logged before a crash and after it."""


def config_of(folder: Path, *trackers: str) -> RunConfig:
    on = [f"tracking.{name}=true" for name in trackers]
    return small_config(folder, "flowbp_sparse", "evaluation.guidance=[1.0, 3.0]", "name=mine", *on)


def log_steps(tracker: Tracker, steps: range, loss: float) -> None:
    for step in steps:
        tracker.log(step, "train", {"loss": loss, "wait_s": 0.5, "reward/hps|v2": float("nan")})
        done = step + 1
        if done % 2 == 0:
            values = {guidance: {"verifier": np.array([guidance, 0.0]) + loss} for guidance in (1.0, 3.0)}
            results = {g: Evaluation(v, {}, ("", "")) for g, v in values.items()}
            tracker.evaluated(done, results, dict.fromkeys(values, (PICTURES, PROMPTS)))


def crashed_and_resumed(config: RunConfig, say: Callable[[str], object] = print) -> Path:
    """Four steps, of which the last comes after the checkpoint of step 2; then from there to step 4, in a new start."""
    folder = config.run_dir
    folder.mkdir(parents=True)
    for again, loss in ((False, CRASHED), (True, RESUMED)):
        with closing(Tracker(folder, config, say=say)) as tracker:
            tracker.rewind(2 if again else -1)
            log_steps(tracker, range(2, 4) if again else range(4), loss)
    return folder


def test_tensorboard_reads_one_curve_of_a_run_that_went_on(tmp_path: Path) -> None:
    """As its own reader reads the files: each step once, with the last value; the checkpoint's evaluation is there."""
    pytest.importorskip("tensorboard", reason="needs pip install 'flowbp-ray[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = crashed_and_resumed(config_of(tmp_path, "tensorboard"))
    train, evaluation = (
        EventAccumulator(str(folder / "tensorboard" / part)).Reload() for part in ("train", "evaluation")
    )
    curve = [(event.step, event.value) for event in train.Scalars("loss/loss")]
    assert curve == [(0, CRASHED), (1, CRASHED), (2, RESUMED), (3, RESUMED)]
    assert sorted(train.Tags()["scalars"]) == ["loss/loss", "time/wait_s"]
    for name, guidance in (("evaluation", 1.0), ("evaluation_guidance_3", 3.0)):
        curve = [(event.step, event.value) for event in evaluation.Scalars(f"{name}/verifier")]
        assert curve == [(2, guidance / 2 + CRASHED), (4, guidance / 2 + RESUMED)]
        events = evaluation.Images(f"held_out/guidance_{guidance:g}")
        assert [event.step for event in events] == [2, 4]
        sheet = grid(list(PICTURES), PROMPTS, columns=4)
        assert (events[0].height, events[0].width) == (sheet.height, sheet.width)
        texts = evaluation.Tensors(f"held_out/guidance_{guidance:g}/prompts/text_summary")
        assert {event.step for event in texts} == {2, 4}
        for event in texts:
            assert event.tensor_proto.string_val[0].decode() == f"1. {PROMPTS[0]}\n2. {PROMPTS[1]}"


def test_tensorboard_starts_over_where_there_was_no_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs pip install 'flowbp-ray[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of(tmp_path, "tensorboard")
    config.run_dir.mkdir(parents=True)
    with closing(Tracker(config.run_dir, config)) as tracker:
        for loss in (CRASHED, RESUMED):
            tracker.rewind(-1)
            log_steps(tracker, range(2), loss)
    read = EventAccumulator(str(config.run_dir / "tensorboard" / "train")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss/loss")] == [(0, RESUMED), (1, RESUMED)]


def test_mlflow_has_one_run_of_a_run_that_went_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real database: numbers, the configuration, sheets of pictures and their prompts."""
    pytest.importorskip("mlflow", reason="needs pip install 'flowbp-ray[mlflow]'")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said: list[str] = []
    folder = crashed_and_resumed(config_of(tmp_path, "mlflow"), said.append)
    assert not said
    client: Any = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")
    [experiment] = client.search_experiments(filter_string="name = 'flowbp_ray'")
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["method.name"] == "flowbp_sparse" and run.data.params["learners.optimizer.lr"]
    history = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss/loss"))
    repeated = [(2, CRASHED), (2, RESUMED), (3, CRASHED), (3, RESUMED)]
    assert history == [(0, CRASHED), (1, CRASHED), *repeated]
    assert run.data.metrics["loss/loss"] == RESUMED and "reward/hps_v2" not in run.data.metrics
    assert run.data.metrics["evaluation_guidance_3/verifier"] == 3.0 / 2 + RESUMED
    stored = client.download_artifacts(run.info.run_id, "", str(tmp_path))
    sheets = sorted(Path(stored).glob("images/*.png"))
    assert len(sheets) == 6 and all("held_out" in sheet.name for sheet in sheets)  # three evaluations, two guidances
    with Image.open(sheets[0]) as opened:
        assert np.array_equal(np.asarray(opened), np.asarray(grid(list(PICTURES), PROMPTS, columns=4)))
    named = sorted(p.name for p in Path(stored).glob("prompts/*.json"))
    assert named == [f"step_{step:06d}_guidance_{guidance}.json" for step in (2, 4) for guidance in (1, 3)]
    assert json.loads((Path(stored) / "prompts" / named[0]).read_text()) == {"prompts": PROMPTS}


def test_a_server_that_is_not_there_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs pip install 'flowbp-ray[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said: list[str] = []
    folder = crashed_and_resumed(config_of(tmp_path, "mlflow"), said.append)
    assert len(said) == 2 and all(line.startswith("mlflow: ") and len(line.splitlines()) == 1 for line in said)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2 + 2 + 2 * 2


def test_wandb_gets_the_pictures_with_their_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_of(tmp_path, "wandb")
    config.run_dir.mkdir(parents=True)
    with closing(Tracker(config.run_dir, config)) as tracker:
        log_steps(tracker, range(2), RESUMED)
    [logged] = (config.run_dir / "wandb").glob("offline-run-*/*.wandb")
    kept = []
    for file in logged.parent.glob("files/media/images/**/*.png"):
        with Image.open(file) as opened:
            kept.append(np.asarray(opened.convert("RGB")).tobytes())
    assert sorted(kept) == sorted(picture.tobytes() for picture in [*PICTURES, *PICTURES])  # of two guidances
    until, wanted = time.monotonic() + 60, (PROMPTS[0].encode(), b"evaluation_guidance_3/verifier")
    while not all(part in logged.read_bytes() for part in wanted):  # wandb's own process writes it
        assert time.monotonic() < until, logged.read_bytes()
        time.sleep(0.1)


class Breaks:
    """A tracker that fails at its second line."""

    name = "breaks"

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, step: int, kind: str, numbers: Any) -> None:
        if self.steps:
            raise RuntimeError("no\nroom")
        self.steps.append(step)

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        raise AssertionError("it had failed before")


def test_a_tracker_that_fails_is_left_out(tmp_path: Path) -> None:
    config, said = config_of(tmp_path), list[str]()
    config.run_dir.mkdir(parents=True)
    with closing(Tracker(config.run_dir, config, say=said.append)) as tracker:
        breaks: Any = Breaks()
        tracker.destinations.append(breaks)
        log_steps(tracker, range(4), RESUMED)
    assert breaks.steps == [0] and len(said) == 1 and said[0].startswith("breaks: no room; it gets no more")
    assert len((config.run_dir / "metrics.jsonl").read_text().splitlines()) == 8


def test_few_and_small_pictures_are_sent() -> None:
    large = np.zeros((10, 2 * LARGEST, LARGEST, 3), np.uint8)
    shown = reduced(large, [str(i) for i in range(10)], 4, 3.0)
    assert shown.prompts == ("0", "2", "5", "7") and shown.name == "held_out/guidance_3"
    assert {picture.shape for picture in shown.pictures} == {(LARGEST, LARGEST // 2, 3)}
    assert allowed("reward_grad_cosine/a|b: ä") == "reward_grad_cosine/a_b_ _"


def test_a_tracker_that_is_not_installed_is_said_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "mlflow"):
        with pytest.raises(ValueError, match=rf"tracking.{name} needs {name}; .*'flowbp-ray\[{name}\]'"):
            check_trackers(config_of(tmp_path, name).tracking)
    check_trackers(config_of(tmp_path).tracking)
