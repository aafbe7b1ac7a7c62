"""What each key means: every field says it, `config-reference` prints it, and the committed page is the same."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flowbp_ray.config import loading, reference
from flowbp_ray.config.method import build_method
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.surrogate import METHODS, Method
from tests.test_cli import call

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def models_within(annotation: Any) -> list[type[BaseModel]]:
    """The models of an annotation such as list[Model], Model | None or Annotated[A | B, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_within(part)]


def fields_of(model: type[BaseModel], prefix: str = "") -> list[tuple[str, type[BaseModel], FieldInfo]]:
    """Every field below `model`, by walking its annotations: independent of the JSON schema that is printed."""
    found = []
    for name, field in model.model_fields.items():
        found.append((prefix + name, model, field))
        for inner in models_within(field.annotation):
            found += fields_of(inner, f"{prefix}{name}.")
    return found


FIELDS = fields_of(RunConfig)


def test_the_walk_reaches_lists_unions_and_inherited_fields() -> None:
    names = {name for name, _, _ in FIELDS}
    assert {"rewards.terms.clip", "judges.template.yes_id", "judges.template.pattern", "learners.lora.rank"} <= names
    assert {"samplers.min", "learners.resources", "judges.threads", "rewards.monitors.options"} <= names
    assert len(FIELDS) > 130


@pytest.mark.parametrize(("name", "model", "field"), FIELDS, ids=[f"{n}-{m.__name__}" for n, m, _ in FIELDS])
def test_every_field_says_what_it_means(name: str, model: type[BaseModel], field: FieldInfo) -> None:
    assert field.description and field.description.strip()
    assert field.description.strip() not in {(m.__doc__ or "").strip() for m in models_within(field.annotation)}
    if type(None) in typing.get_args(field.annotation):
        optional_and_exclusive = {"judges.url", "judges.model"}
        assert "null" in field.description or name in optional_and_exclusive
    if typing.get_origin(field.annotation) is typing.Literal and len(typing.get_args(field.annotation)) > 1:
        assert all(
            yaml.safe_dump(option).split()[0] in field.description for option in typing.get_args(field.annotation)
        )


def test_every_key_is_printed_with_its_description() -> None:
    """Pydantic's JSON schema leaves out a description that repeats the section's own, which would be seen here."""
    keys = reference.keys()
    assert len(keys) == len(FIELDS) and all(key.description for key in keys)
    printed = sorted((key.name.replace("[i]", ""), key.description) for key in keys)
    assert printed == sorted((name, " ".join((f.description or "").split())) for name, _, f in FIELDS)


def test_the_committed_page_is_the_generated_one() -> None:
    again = "write it anew: flowbp-ray config-reference --markdown > docs/configuration.md"
    assert PAGE.read_text() == reference.page(), again


def shown(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert call("config-reference", *arguments) == 0
    return capsys.readouterr().out


def test_a_key_shows_type_constraint_default_and_unit(capsys: pytest.CaptureFixture[str]) -> None:
    printed = shown("cluster.stall_timeout", capsys=capsys)
    assert printed.startswith("cluster.stall_timeout\n    number, > 0, default 600.0\n    Seconds without an answer")
    printed = shown("learners", capsys=capsys)
    assert "learners.optimizer.lr\n    number, > 0, default 1.0e-05\n" in printed
    assert "learners.micro_batch\n    whole number, >= 1, required\n" in printed
    assert "learners.zero\n    one of 0 | 1 | 2 | 3, default 2\n" in printed
    assert "learners.lora\n    section or null, default null\n" in printed
    assert "learners.optimizer.betas\n    list of 2 numbers, each >= 0, < 1, default [0.9, 0.999]\n" in printed
    assert "samplers" not in printed.replace("samplers'", "")
    assert "backbone.height\n    whole number, > 0, default 64\n    Height of the images in pixels." in shown(
        capsys=capsys
    )


def test_entries_of_lists_and_kinds_of_templates_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    for spelled in (
        "rewards.terms.weight",
        "rewards.terms[0].weight",
        "rewards.terms.0.weight",
        "rewards.terms[i].weight",
    ):
        assert shown(spelled, capsys=capsys).startswith("rewards.terms[i].weight\n    number, default 1.0\n")
    template = shown("judges.template", capsys=capsys)
    assert "judges[i].template.pattern (kind: free)\n    text, required\n" in template
    assert "judges[i].template.instruction (kind: free)\n    text, length >= 1, required\n" in template
    assert "judges[i].template.instruction (kind: yes_no)\n    text or null, default null\n" in template


def test_the_method_lists_names_and_axes(capsys: pytest.CaptureFixture[str]) -> None:
    printed = shown("method", capsys=capsys)
    assert "{name: flowbp_sparse, k: 4, late_bias: 1.0, rescale: 0.5, tail: 1.0}" in printed
    assert "method.active: {kind: strided, k: 3}" in printed and "method.similarity: {tau: ..." in printed
    assert all(f"name: {name}" in printed for name in METHODS)
    assert {field.name for field in dataclasses.fields(Method)} == set(reference.AXES)


def test_what_is_printed_for_a_method_can_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is YAML that the configuration takes, and arguments at their defaults change nothing."""
    lines = shown("method", capsys=capsys).splitlines()
    for line in (line for line in lines if line.startswith("{name: ")):
        written = loading.load("shapes_flowbp_sparse", [f"method={line}"])
        assert written.surrogate() == METHODS[written.method["name"]]()
    kinds = [line.split(": ", 1) for line in lines if line.startswith("method.") and ": {kind" in line]
    assert len(kinds) == 18
    for axis, kind in kinds:
        fitting = {"active": {"kind": "supports"}} if "adams_bashforth" in kind else {}
        build_method({axis.removeprefix("method."): yaml.safe_load(kind), **fitting})


def test_an_unknown_section_offers_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config-reference", "learner.optimizer") == 2
    error = capsys.readouterr().err
    assert "unknown key 'learner.optimizer'; did you mean 'learners.optimizer'?" in error and error.count("\n") == 1
