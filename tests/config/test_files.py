"""What YAML files and overrides mean where YAML 1.1 would have another opinion."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flowbp_ray.config import loading, yaml_text
from flowbp_ray.utils.errors import ConfigError
from flowbp_ray.utils.files import cache_path


def config(tmp_path: Path, text: str, *overrides: str) -> loading.RunConfig:
    file = tmp_path / "my.yaml"
    file.write_text(f"extends: shapes_refl.yaml\n{text}\n")
    return loading.load(file, overrides)


def test_dates_times_and_zeros_are_what_they_look_like(tmp_path: Path) -> None:
    """A shipped configuration is extended by its name alone, from any folder."""
    for name in ("2025-01-01", "1e-4x", "0x"):
        assert config(tmp_path, f"name: {name}").name == config(tmp_path, "", f"name={name}").name == name
    assert config(tmp_path, "seed: 010").seed == 10
    assert config(tmp_path, "learners: {optimizer: {lr: 1e-4}}").learners.optimizer.lr == 1e-4
    for name in ("2025", "1e5", "no", "1_0"):
        with pytest.raises(ConfigError, match=r"my.yaml: name: .*; put it into quotes: \"") as caught:
            config(tmp_path, f"name: {name}")
        assert "\n" not in str(caught.value)
        assert config(tmp_path, f'name: "{name}"').name == name


@pytest.mark.parametrize("path", ["/data/run #2", "/data/Lab: A", "/data/[1] #x", "/a#b", "C:", "/data/%x", "-", "@x"])
def test_overrides_keep_what_yaml_would_cut_off(path: str) -> None:
    assert loading.load("shapes_refl", [f"output={path}"]).output == path


def test_overrides_are_still_yaml() -> None:
    given_ = ["steps=7", "learners.optimizer.lr=2e-5", "evaluation.prompts=null", "evaluation.guidance=[1, 2.5]"]
    read = loading.load("shapes_refl", [*given_, "samplers={count: 3}", "tracking.wandb=true", "output='a #b'"])
    assert (read.steps, read.learners.optimizer.lr, read.evaluation.prompts) == (7, 2e-5, None)
    assert (read.evaluation.guidance, read.samplers.count, read.tracking.wandb) == ([1.0, 2.5], 3, True)
    assert read.output == "a #b"


def test_a_home_is_put_in_for_its_sign_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("name: mine\n")
    paths = "output: ~/runs\ndata: {prompts: ~/p.txt}\nevaluation: {prompts: ~/e.txt}\nbackbone: {path: ~/model}"
    (tmp_path / "my.yaml").write_text(f"extends: [shapes_refl.yaml, ~/base.yaml]\n{paths}\nencoder: {{cache: ~/c}}\n")
    read = loading.load("~/my.yaml")
    assert str(read.run_dir) == f"{tmp_path}/runs/mine" and read.data.prompts == f"{tmp_path}/p.txt"
    assert (read.evaluation.prompts, read.backbone.path) == (f"{tmp_path}/e.txt", f"{tmp_path}/model")
    assert read.encoder.cache == f"{tmp_path}/c"
    with pytest.raises(ConfigError, match="output: '~nobody-here/x' names the home of nobody here; write the whole"):
        loading.load("shapes_refl", ["output=~nobody-here/x"])


BAD = {
    "a variable of the shell": (
        "output: ${HOME}/runs",
        r"my.yaml: output: .*'HOME' not found; .*write \$\{oc.env:HOME}",
    ),
    "a brace forgotten": ("output: ${HOME/runs", r"my.yaml: output: .*write \$\{oc.env:HOME}"),
    "a key twice": ("steps: 3\nsteps: 4", r"my.yaml is not YAML: line 3: key 'steps' is there twice; keep one"),
    "a tab": ("data:\n\tprompts: x", r"my.yaml is not YAML: line 3: .*indent with spaces"),
    "another document": ("---\nsteps: 3", r"my.yaml is not YAML: .*keep one document"),
    "a set": ("steps: !!set {a}", r"my.yaml: steps: .*put other values into quotes"),
    "half an emoji": (r'output: "a\ud83d"', r"my.yaml: .*\\ud83d at character 2 is half of a character"),
    "nested": ("method: " + "[" * 200 + "]" * 200, r"my.yaml is not YAML: .*more than 100 levels"),
    "several": ("steps: x\nseed: -1\nsamplers: {counts: 1}", r"my.yaml: .*steps: .*; .*counts"),
    "guidance": ("evaluation: {guidance: [0.5]}", r"evaluation.guidance.0: .*greater than or equal to 1, got 0.5"),
    "no guidance": ("evaluation: {guidance_ends: [.nan]}", r"evaluation.guidance_ends.0: .*got nan"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_problem_is_one_line_with_the_file(tmp_path: Path, case: str) -> None:
    text, expected = BAD[case]
    with pytest.raises(ConfigError, match=expected) as caught:
        config(tmp_path, text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(b"steps: 3\nname: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"my.yaml, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"):
        loading.load(tmp_path / "my.yaml")


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)
odd = st.sampled_from(
    ["1e-4", "2025-01-01", "010", "12:30", "no", "~", "", "${seed}", "a: b", "a #b", ".5", "0x1", "1_0"]
)


@given(texts | odd)
def test_a_text_comes_back_from_a_file(text: str) -> None:
    """By our reader, and by PyYAML's own."""
    for read in (yaml_text.parse, yaml.safe_load):
        assert read(yaml_text.dump({"text": text})) == {"text": text}


def test_a_dumped_configuration_is_read_back(tmp_path: Path) -> None:
    for output in ("${HOME}/runs", "1e-4", "a\\b", "${", "a # b: c"):
        plain = loading.load("shapes_refl").model_dump(mode="json")
        made = loading.validate({**plain, "output": output, "name": "2025-01-01"})
        (tmp_path / "config.yaml").write_text(loading.dump(made))
        assert loading.load(tmp_path / "config.yaml") == made


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without a home")
def test_without_a_home_the_line_names_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "FLOWBP_RAY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.setuid(4242)
        try:
            cache_path("auto")
        except ValueError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert b"uid 4242) has no home" in (said := os.read(reading, 1000)) and b"set HOME or FLOWBP_RAY_CACHE" in said
