"""A method as it is spelled in YAML: a name with arguments, or any point of the four axes."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flowbp_ray.surrogate import METHODS, Method
from flowbp_ray.utils.errors import nearest


def build_method(spec: dict[str, Any]) -> Method:
    """A named method with its arguments, any axis of it replaced, or a point of the design space spelled out.

    {name: flowbp_sparse, k: 3, draws: per_sample}   or   {target: {kind: early_stop}, active: {kind: strided, k: 3}}
    """
    hints = typing.get_type_hints(Method)
    fields = {name: hints[name] for name in _names(Method)}
    name = spec.get("name")
    base: Callable[..., Method]
    arguments: dict[str, Any] = {}
    if name is None:
        base, what = Method, "key in method"
    elif name not in METHODS:
        raise ValueError(nearest(str(name), list(METHODS), "method"))
    else:
        arguments = dict(inspect.signature(METHODS[name]).parameters)
        base, what = METHODS[name], f"key in method {name}"
    rest = {key: value for key, value in spec.items() if key != "name"}
    for key in rest:
        if key not in arguments and key not in fields:
            raise ValueError(nearest(key, sorted({*arguments, *fields}), what))
    axes = {key: _axis(key, value, fields[key]) for key, value in rest.items() if key not in arguments}
    given = {key: value for key, value in rest.items() if key in arguments}
    try:
        return dataclasses.replace(base(**given), **axes)
    except TypeError as error:
        raise ValueError(f"method {name}: {error}; write a value of the right type") from error


def _axis(key: str, value: Any, hint: Any) -> Any:
    """One axis: a plain value, or a mapping that says by `kind` which of the axis's classes it is."""
    classes = [c for c in _members(hint) if dataclasses.is_dataclass(c)]
    if isinstance(value, dict) and any("kind" in _names(c) for c in classes):
        kinds = {typing.get_type_hints(c)["kind"].__args__[0]: c for c in classes}
        if "kind" not in value:
            raise ValueError(f"method.{key} needs a kind, one of: {', '.join(sorted(kinds))}")
        if value["kind"] not in kinds:
            raise ValueError(nearest(str(value["kind"]), list(kinds), f"kind of method.{key}"))
        hint = kinds[value["kind"]]
        for name in value:
            if name not in _names(hint):
                raise ValueError(nearest(name, _names(hint), f"key in method.{key}"))
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(["method", key, *(str(part) for part in first["loc"] if str(part) in _all_names(classes))])
        raise ValueError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from error


def _members(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def _names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _all_names(classes: list[Any]) -> set[str]:
    return {name for cls in classes for name in _names(cls)}
