"""A judge as a plain object."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowbp_ray.judges.config import JudgeConfig
from flowbp_ray.judges.judge import Judge
from flowbp_ray.utils.errors import RunFailed
from tests.judges.fake import Fake, picture_of, said


def test_a_gates_weight_goes_from_low_to_high(tmp_path: Path) -> None:
    with Fake(lambda body, before: (200, said(f"Final Score: {picture_of(body)[0, 0, 0]}"))) as fake:
        settings = {"name": "eye", "url": fake.url, "role": "gate", "template": {"kind": "unified_reward_1_5"}}
        judge = Judge(JudgeConfig.model_validate(settings | {"gate": {"low": 2, "high": 4}}), tmp_path / "log")
        images = [np.full((4, 4, 3), value, np.uint8) for value in (1, 2, 3, 4, 5)]
        weights = judge.weights(images, ["x"] * 5, [(i,) for i in range(5)])
        judge.close()
    assert weights == (0.0, 0.0, 0.5, 1.0, 1.0)


def test_what_a_monitor_misses_a_gate_stops_at(tmp_path: Path) -> None:
    def answer(body: dict[str, Any], before: int) -> tuple[int, Any]:
        value = picture_of(body)[0, 0, 0]
        return 200, said("who knows" if value == 2 else f"Final Score: {value}")

    images = [np.full((4, 4, 3), value, np.uint8) for value in (1, 2, 3)]
    asked = images, ["x"] * 3, [(i,) for i in range(3)]
    with Fake(answer) as fake:
        settings = {
            "name": "eye",
            "url": fake.url,
            "template": {"kind": "unified_reward_1_5"},
            "tries": 2,
            "backoff": 0,
        }
        judge = Judge(JudgeConfig.model_validate(settings | {"role": "gate"}), tmp_path / "log")
        answers = judge.score(*asked)
        with pytest.raises(RunFailed, match=r"gate 'eye' has no answer \(1 of 3 samples\): unparsable"):
            judge.weights(*asked)
        judge.close()
    assert [math.isnan(s) for s in answers.scores["overall"]] == [False, True, False] and answers.retries == 1
