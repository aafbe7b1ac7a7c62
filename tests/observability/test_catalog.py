"""One table: names, trackers' groups, and the dashboard that is generated from it."""

from __future__ import annotations

import json
import re

import pytest

from actors.ray_metrics import COLLECTION, RayMetrics
from flowbp_ray.observability.catalog import TABLE, find, grouped, markdown, readings
from flowbp_ray.observability.dashboard import PANELS, Panel, _panel, dashboard
from tests.paths import ROOT

FILE = ROOT / "deploy" / "grafana-dashboard.json"


def test_names_are_what_prometheus_takes_and_different() -> None:
    names = [metric.exported for metric in TABLE]
    assert len(set(names)) == len(names) == len({metric.key for metric in TABLE})
    assert all(re.fullmatch(r"flowbp_ray_[a-z][a-z0-9_]*", name) for name in names)
    assert all(metric.meaning and bool(metric.tags) == metric.key.endswith("/*") for metric in TABLE)
    by_key = {metric.key: metric.exported for metric in TABLE}
    assert by_key["wait_s"] == "flowbp_ray_wait_seconds" and by_key["idle/*"] == "flowbp_ray_idle_share"
    assert by_key["weight_bytes"] == "flowbp_ray_weight_bytes" and by_key["count/*"] == "flowbp_ray_count_processes"


def test_a_family_is_a_tag_and_an_evaluation_its_metric_and_guidance() -> None:
    line = {"wait_s": 1.5, "reward/hps,v2": 0.25, "loss": None, "unheard_of": 1.0}
    found = [(r.metric.key, dict(r.tags), r.value) for r in readings("train", line)]
    assert found == [("wait_s", {}, 1.5), ("reward/*", {"reward": "hps,v2"}, 0.25)]
    evaluated = {"guidance": 3.0, "verifier": 0.5, "verifier/two_objects": 0.1, "bad": None}
    judged = {"guidance": 1.0, "judge": "j", "pictures": 8, "missing": 1, "j/yes": 0.5, "j": 0.75}
    found = [(dict(r.tags), r.value) for kind in ("evaluation", "judge") for r in readings(kind, evaluated | judged)]
    assert ({"metric": "j", "guidance": "1"}, 0.75) in found and len(found) == 4
    assert find("reward") is None and find("unheard_of") is None


def test_trackers_group_the_same_numbers() -> None:
    line = {
        "wait_s": 1.0,
        "idle/samplers": 0.5,
        "reward/a": 2.0,
        "clipped/a": 0.0,
        "state_bytes_per_image": 8,
        "loss": None,
    }
    assert grouped("train", line) == {
        "time/wait_s": 1.0,
        "idle/samplers": 0.5,
        "reward/a": 2.0,
        "reward/clipped/a": 0.0,
        "bytes/state_bytes_per_image": 8,
    }
    assert grouped("evaluation", {"guidance": 1.0, "verifier": 0.5}) == {
        "evaluation/guidance": 1.0,
        "evaluation/verifier": 0.5,
    }
    assert grouped("judge", {"guidance": 1.0, "j": 0.5}, 1.0) == {"judge/guidance": 1.0, "judge/j": 0.5}
    assert "evaluation_guidance_2.5/verifier" in grouped("evaluation", {"guidance": 2.5, "verifier": 0.5}, 1.0)


def test_the_dashboard_is_the_generated_one_and_asks_for_what_is_exported() -> None:
    made = dashboard()
    assert json.loads(FILE.read_text()) == made, (
        "python -m flowbp_ray.observability.dashboard > deploy/grafana-dashboard.json"
    )
    assert FILE.read_text() == json.dumps(made, indent=1) + "\n"
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids) == len(PANELS) and made["schemaVersion"] >= 36
    places = [tuple(panel["gridPos"][side] for side in ("x", "y")) for panel in made["panels"]]
    assert len(set(places)) == len(places)
    exported = {metric.scraped: metric for metric in TABLE}
    for panel in made["panels"]:
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(set(letters)) == len(letters)
        for target in panel["targets"]:
            match = re.fullmatch(r"max by \(([\w, ]+)\) \((\w+)\{run=~\"\$run\"(, \w+!?=\"\w+\")?\}\)", target["expr"])
            assert match and match[1].split(", ") == ["run", *exported[match[2]].tags]
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == set(match[1].split(", "))
    variables = {variable["name"]: variable for variable in made["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    match = re.fullmatch(r"label_values\((\w+), run\)", variables["run"]["query"]["query"])
    assert match and match[1] in exported
    drawn = {re.search(r"\((ray_\w+)\{", t["expr"])[1] for p in made["panels"] for t in p["targets"]}  # type: ignore[index]
    for group in ("throughput", "time", "idle", "queue", "drift", "bytes", "count", "reward"):
        assert any(exported[name].group == group for name in drawn), group


def test_a_panel_draws_all_of_its_keys_or_none() -> None:
    keys = [metric.key for metric in TABLE]
    targets = _panel(0, Panel("Many", keys[:9]))["targets"]
    assert [target["refId"] for target in targets] == list("ABCDEFGHI")
    with pytest.raises(IndexError):
        _panel(0, Panel("Too many", keys[:27]))


def test_the_docs_have_the_table() -> None:
    assert markdown() in (FILE.parents[1] / "docs" / "observing.md").read_text(), (
        "python -m flowbp_ray.observability.catalog"
    )


def test_without_collection_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = RayMetrics("run")
    monkeypatch.setenv(COLLECTION, "0")
    exporter(0, "train", {"loss": 1.0})
    assert exporter.gauges == {} and exporter.newest == {}
