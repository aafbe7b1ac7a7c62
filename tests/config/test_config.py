"""Configuration: extends, overrides, and one line that says what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowbp_ray.config import loading
from flowbp_ray.config.method import build_method
from flowbp_ray.surrogate import METHODS, Method
from flowbp_ray.utils.errors import ConfigError

SEVEN = sorted(METHODS)


@pytest.mark.parametrize("name", SEVEN)
def test_every_method_has_a_run(name: str) -> None:
    config = loading.load(f"shapes_{name}")
    assert config.method["name"] == name
    assert isinstance(config.surrogate(), Method)


def test_a_resolved_config_reads_back_the_same(tmp_path: Path) -> None:
    config = loading.load("shapes_flowbp_bridge", ["learners.optimizer.lr=3e-5", "steps=7"])
    assert (config.learners.optimizer.lr, config.steps) == (3e-5, 7)
    (tmp_path / "config.yaml").write_text(loading.dump(config))
    assert loading.load(tmp_path / "config.yaml") == config


def test_extends_and_another_method_does_not_inherit_arguments(tmp_path: Path) -> None:
    base = loading.shipped() / "runs" / "shapes_flowbp_sparse.yaml"
    (tmp_path / "mine.yaml").write_text(f"extends: {base}\nname: mine\nmethod: {{name: refl, last: 3}}\n")
    config = loading.load(tmp_path / "mine.yaml")
    assert config.surrogate() == METHODS["refl"](last=3)
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\n")
    with pytest.raises(ConfigError, match=r"extends itself"):
        loading.load(tmp_path / "loop.yaml")


def test_any_point_of_the_four_axes_can_be_spelled_out(tmp_path: Path) -> None:
    """DRTune's active set with the sample as its target, per sample: no named method."""
    base = loading.shipped() / "runs" / "shapes_base.yaml"
    (tmp_path / "own.yaml").write_text(
        f"extends: {base}\nname: own\n"
        "method: {target: {kind: sample}, active: {kind: strided, k: 3}, draws: per_sample}\n"
    )
    method = loading.load(tmp_path / "own.yaml").surrogate()
    assert method.target.kind == "sample" and method.active.kind == "strided" and method.draws == "per_sample"


def test_a_named_method_with_one_axis_replaced() -> None:
    method = build_method({"name": "flowbp_sparse", "k": 3, "weights": {"kind": "uniform"}, "draws": "per_sample"})
    assert method.weights.kind == "uniform" and method.active.k == 3 and method.draws == "per_sample"


BAD = {
    "unknown key": (["learners.micro_bach=2"], r"unknown key in learners 'micro_bach'; did you mean 'micro_batch'\?"),
    "unknown top key": (["stepz=2"], r"unknown key 'stepz'; did you mean 'steps'\?"),
    "unknown method": (["method.name=flowbp_spars"], r"unknown method 'flowbp_spars'; did you mean 'flowbp_sparse'\?"),
    "unknown argument": (["method.kk=3"], r"unknown key in method flowbp_sparse 'kk'"),
    "no kind": (["method.active={k: 3}"], r"method.active needs a kind, one of: .*late_biased"),
    "a kind by itself": (["method.active=strided"], r"method.active needs a kind, one of: .*late_biased"),
    "similarity": (["method.similarity={tauu: 1}"], r"unknown key in method.similarity 'tauu'; did you mean 'tau'\?"),
    "unknown kind": (
        ["method.active={kind: stride}"],
        r"unknown kind of method.active 'stride'; did you mean 'strided'",
    ),
    "unknown key of an axis": (["method.active={kind: strided, kk: 2}"], r"unknown key in method.active 'kk'"),
    "value of an axis": (["method.active={kind: strided, k: 0}"], r"method.active: .*k must be"),
    "k above n": (["method.k=20"], r"active steps k must be in \[1, 16\], got 20"),
    "batch": (["data.rollout_batch=7"], r"write data.rollout_batch=4"),
    "ranks": (["learners.count=3"], r"write learners.count=2"),
    "micro": (["learners.micro_batch=7"], r"write learners.micro_batch=4"),
    "torch ranks": (["learners.engine=torch"], r"write learners.count=1"),
    "penalty": (["learners.base_penalty.weight=-1"], r"base_penalty.weight: .*greater than or equal to 0.*-1"),
    "guidance of the base": (
        ["learners.base_penalty={weight: 1, guidance: 0.5}"],
        r"learners.base_penalty.guidance: .*greater than or equal to 1.*0.5",
    ),
    "part of a GPU": (["learners.gpus=0.5", "learners.count=2"], r"write learners.gpus=1, or learners.count=1"),
    "one GPU and a half": (["samplers.gpus=1.5"], r"samplers.gpus=1.5: .*whole number; write 1"),
    "broadcasts to CPUs": (["cluster.transport=nccl", "learners.gpus=1"], r"GPUs with GPUs .*write samplers.gpus=1"),
    "broadcasts within a GPU": (
        ["cluster.transport=nccl", "learners.count=1", "cluster.colocate=true"],
        r"transport=nccl needs a GPU for each process, got samplers.gpus=0.2 of cluster.colocate; write",
    ),
    "value": (["steps=-1"], r"steps: .*greater than or equal to 1.*-1"),
    "no equals": (["steps"], r"is not key=value"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_one_line_that_says_what_to_write(case: str) -> None:
    overrides, expected = BAD[case]
    with pytest.raises(ConfigError, match=expected) as caught:
        loading.load("shapes_flowbp_sparse", overrides)
    assert len(str(caught.value).splitlines()) <= 2


def test_an_unknown_config_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'shapes_refl'\?"):
        loading.load("shapes_ref")


def test_naming_another_method_leaves_the_old_ones_arguments_behind() -> None:
    config = loading.load("shapes_flowbp_sparse", ["method.name=refl", "method.last=3"])
    assert config.method == {"name": "refl", "last": 3}
    kept = loading.load("shapes_flowbp_sparse", ["method.name=flowbp_sparse"])
    assert kept.method == loading.load("shapes_flowbp_sparse").method


def test_a_reward_is_named_once() -> None:
    with pytest.raises(ValueError, match="shapes_clip is named twice"):
        loading.load("shapes_flowbp_sparse", ["rewards.monitors=[shapes_clip]"])


def test_an_index_changes_one_entry_of_a_list() -> None:
    both = "rewards.terms=[{name: shapes_clip, weight: 2}, {name: b, kind: shapes_clip_heldout}]"
    changed = loading.load("shapes_flowbp_sparse", [both, "rewards.terms.1.clip=0.5", "rewards.terms[0].weight=3"])
    assert [(t.name, t.weight, t.clip) for t in changed.rewards.terms] == [("shapes_clip", 3, 1.0), ("b", 1.0, 0.5)]
    named = loading.load("shapes_flowbp_sparse", [both, "rewards.terms[0].options={strength: 2}"])
    assert named.rewards.terms[0].options == {"strength": 2} and named.rewards.terms[0].weight == 2
    lost = ["rewards.terms[7].clip=0.5", "rewards.terms[x].clip=0.5", "nothing[0].clip=1", "steps[0]=3"]
    for override in [*lost, "rewards.terms[0.clip=1"]:
        with pytest.raises(ConfigError) as caught:
            loading.load("shapes_flowbp_sparse", [override])
        assert "\n" not in str(caught.value) and override.split("[")[0] in str(caught.value)


def test_adapters_are_not_broadcast() -> None:
    lora = ["learners.lora={rank: 4, alpha: 8}", "learners.count=1"]
    shared = ["cluster.transport=nccl", "cluster.colocate=true"]
    assert not loading.load("shapes_flowbp_sparse", [*shared, *lora]).broadcasts
    assert loading.load("shapes_flowbp_sparse", shared[:1]).broadcasts
    assert not loading.load("shapes_flowbp_sparse").broadcasts


BLAMED = {
    "learners.optimizer.lr=.nan": "override 'learners.optimizer.lr=.nan': learners.optimizer.lr: ",
    "rewards.terms[0].weight=x": r"override 'rewards.terms\[0\].weight=x': rewards.terms.0.weight: ",
    "learners={optimizer: {lr: .nan}}": "override .*: learners.optimizer.lr: ",
    "steps=": "override 'steps=': steps: .*got nothing; write a value",
    "steps=true": "override 'steps=true': steps must be a number, got true",
    "learners.zero=true": "override 'learners.zero=true': learners: zero must be a number, got true",
    "evaluation.guidance=[1, true]": r"override .*: evaluation: guidance must be a number, got \[1, true\]",
    "samplers.resources={fast: true}": "override .*: samplers: resources must be a number, got .*true",
    "learners.optimizer.lr=false": "override .*: learners.optimizer: lr must be a number, got false",
    "name=no": "override 'name=no': name: .*put it into quotes: '\"no\"'",
    "name=a/b": "override 'name=a/b': name: must be letters, digits",
    "name=" + "n" * 300: "override .*: name: .*at most 200 characters",
}


@pytest.mark.parametrize("override", sorted(BLAMED))
def test_a_problem_of_an_override_names_it_and_not_the_file(override: str) -> None:
    with pytest.raises(ConfigError, match=f"^{BLAMED[override]}"):
        loading.load("shapes_refl", [override])


def test_problems_of_several_places_name_those(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: shapes_refl\nsteps: 0\n")
    with pytest.raises(ConfigError, match=r"^overrides: seed: .*; steps: "):
        loading.load("shapes_refl", ["seed=-1", "steps=0"])
    for path, overrides in ((tmp_path / "mine.yaml", ["seed=-1"]), (tmp_path / "mine.yaml", [])):
        with pytest.raises(ConfigError, match=rf"^{path}: .*steps: "):
            loading.load(path, overrides)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder, not a configuration"):
        loading.load(tmp_path)
