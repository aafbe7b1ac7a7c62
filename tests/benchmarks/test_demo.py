"""What the demo and its study print, on numbers made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import demo, demo_study


def estimate(mean: float, low: float = 0.0, high: float = 0.0) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def summary() -> dict[str, Any]:
    def part(value: float, change: float) -> dict[str, Any]:
        before = {metric: estimate(value) for metric in demo.ROWS} | {"colour_entropy_bits": 2.5}
        after = {metric: estimate(value + change) for metric in demo.ROWS} | {"colour_entropy_bits": 2.75}
        paired = {metric: estimate(change, change - 0.05, change + 0.05) for metric in demo.ROWS}
        return {"before": before, "after": after, "change": paired}

    return {"guidance": {"1": part(0.4, 0.25), "3": part(0.6, 0.0)}}


def test_the_readmes_table() -> None:
    lines = demo.readme_table(summary()).splitlines()
    assert lines[3] == "| the verifier accepts | 40.0 % | 65.0 % | +25.0 (+20.0 to +30.0) | 60.0 % |"
    assert lines[4].endswith("| 0.400 | 0.650 | +0.250 (+0.200 to +0.300) | 0.600 |")
    assert lines[-1] == "| variety of colours, bits | 2.50 | 2.75 | +0.25 | 2.50 |"


def line(run: str, **verifier: list[float]) -> dict[str, Any]:
    """Two prompts; verifier by guidance (g1, g3)."""
    values = {
        name.removeprefix("g"): {m: v for m in demo_study.SHOWN if m != "diversity"} | {"colour_entropy_bits": 2.0}
        for name, v in verifier.items()
    }
    return {"run": run, "seed": 42} | values


def test_the_study_compares_each_model_at_its_own_best_guidance() -> None:
    base, tuned = line("base", g1=[0.0, 0.5], g3=[0.5, 1.0]), line("tuned", g1=[1.0, 1.0], g3=[0.0, 0.0])
    control = line("control", g1=[0.5, 0.5])
    assert demo_study.best(base, "verifier") == "3" and demo_study.best(tuned, "verifier") == "1"
    rows = demo_study.table([base, tuned, control]).splitlines()
    found = {row.split(" | ")[1]: row.split(" | ")[3].split(" ")[0] for row in rows if row.startswith("| 42 | ")}
    assert found == {
        "tuned less base, both without guidance": "+75.0",
        "tuned less base, each at its best guidance": "+25.0",
        "tuned without guidance less base at 3": "+25.0",
        "distillation: control less base, without guidance": "+25.0",
        "the rewards: tuned less control, without guidance": "+50.0",
    }
    assert sum(row.startswith("| control ") for row in rows) == 1


def test_a_readme_without_the_block_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "before_above_after_guidance_1.png").write_bytes(b"png")
    (tmp_path / "README.md").write_text("nothing\n")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="no <!-- demo -->"):
        demo.write_readme(tmp_path, summary())
    (tmp_path / "README.md").write_text("a\n<!-- demo -->\nold\n<!-- /demo -->\nb\n")
    demo.write_readme(tmp_path, summary())
    text = (tmp_path / "README.md").read_text()
    assert "old" not in text
    assert text.startswith("a\n<!-- demo -->\n| | base |") and text.endswith("<!-- /demo -->\nb\n")
    assert (tmp_path / "docs" / "before_above_after.png").read_bytes() == b"png"
