"""A method as it is spelled in YAML: a name with arguments, or any point of the four axes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from flowbp_ray.surrogate import METHODS, Method
from flowbp_ray.surrogate.methods import sampling
from flowbp_ray.utils.errors import nearest


def build_method(spec: dict[str, Any] | None) -> Method:
    """A named method with its arguments, any axis of it replaced, or a point of the design space spelled out.

    None: no surrogate, see `sampling`.

    {name: flowbp_sparse, k: 3, draws: per_sample}   or   {target: {kind: early_stop}, active: {kind: strided, k: 3}}
    """
    if spec is None:
        return sampling()
    fields = _names(Method)
    name = spec.get("name")
    base: Callable[..., Method]
    arguments: dict[str, Any] = {}
    if name is None:
        base, what = Method, "key in method"
    elif not isinstance(name, str) or name not in METHODS:
        raise ValueError(nearest(str(name), list(METHODS), "method"))
    else:
        arguments = dict(inspect.signature(METHODS[name]).parameters)
        base, what = METHODS[name], f"key in method {name}"
    rest = {key: value for key, value in spec.items() if key != "name"}
    for key in rest:
        if key not in arguments and key not in fields:
            raise ValueError(nearest(key, sorted({*arguments, *fields}), what))
    axes = {key: _axis(key, value) for key, value in rest.items() if key not in arguments}
    given = {key: value for key, value in rest.items() if key in arguments}
    try:
        return dataclasses.replace(base(**given), **axes)
    except TypeError as error:
        raise ValueError(f"method {name}: {error}; write a value of the right type") from error


def _axis(key: str, value: Any) -> Any:
    """One axis: a plain value, or a mapping that says by `kind` which of the axis's classes it is."""
    try:
        return _adapter(key).validate_python(value)
    except ValidationError as error:
        raise ValueError(_message(key, error)) from error


@functools.cache
def _adapter(key: str) -> TypeAdapter[Any]:
    """How pydantic reads an axis; where it has kinds, they decide which class it is."""
    hint: Any = typing.get_type_hints(Method)[key]
    if any(_classes(key)):
        hint = Annotated[hint, Field(discriminator="kind")]
    return TypeAdapter(hint)


def _classes(key: str) -> dict[str, Any]:
    """The classes of an axis by `kind`, "" for one that has none."""
    options = typing.get_args(typing.get_type_hints(Method)[key])
    return {getattr(option, "kind", ""): option for option in options if dataclasses.is_dataclass(option)}


def _message(key: str, error: ValidationError) -> str:
    """One problem as one line; of several an unknown key, which may have caused the others."""
    problems, classes = error.errors(include_url=False), _classes(key)
    first = next((e for e in problems if e["type"] == "unexpected_keyword_argument"), problems[0])
    if first["type"] in ("union_tag_not_found", "model_attributes_type"):
        return f"method.{key} needs a kind, one of: {', '.join(sorted(classes))}"
    if first["type"] == "union_tag_invalid":
        return nearest(first["ctx"]["tag"], list(classes), f"kind of method.{key}")
    kind, *where = (str(part) for part in (first["loc"] if any(classes) else ("", *first["loc"])))
    if first["type"] == "unexpected_keyword_argument":
        return nearest(where[-1], _names(classes[kind]), f"key in method.{key}")
    return f"{'.'.join(['method', key, *where])}: {first['msg'].removeprefix('Value error, ')}"


def _names(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]
