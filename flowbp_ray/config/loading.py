"""Read a `RunConfig` from YAML, with `extends` and dotted overrides; each problem names its key and what to write."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from flowbp_ray.config.schema import RunConfig
from flowbp_ray.utils.errors import ConfigError, nearest


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML at `path` (or the shipped one of that name), apply `key=value` overrides, and validate."""
    tree = _read(_find(Path(path)), ())
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not key=value; write for example learners.optimizer.lr=1e-4")
        try:
            change = _change(tree, override)
            same = OmegaConf.select(change, "method.name") == OmegaConf.select(tree, "method.name")
            tree = OmegaConf.merge(tree, change) if same else _override_method(OmegaConf.merge(tree, change), change)
        except (OmegaConfBaseException, TypeError, IndexError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"override {override!r} cannot be applied: {str(error).splitlines()[0]}") from error
    plain = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(plain, dict)
    return validate({str(k): v for k, v in plain.items()})


def validate(plain: dict[str, Any]) -> RunConfig:
    """Validate a plain tree; every problem becomes one line of a `ConfigError`."""
    try:
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        raise ConfigError("\n".join(_line(e) for e in error.errors(include_url=False)[:4])) from error


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML, which `load` reads back to the same value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def shipped() -> Path:
    """The folder of the configurations that come with the package."""
    import configs

    return Path(next(iter(configs.__path__)))


def _find(path: Path) -> Path:
    for candidate in (path, shipped() / path, shipped() / "runs" / path.with_suffix(".yaml").name):
        if candidate.is_file():
            return candidate
    known = [p.stem for p in (shipped() / "runs").glob("*.yaml")]
    raise ConfigError(f"{nearest(path.stem, known, 'config')} (no file {path})")


def _read(path: Path, seen: tuple[Path, ...]) -> Any:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path.name} extends itself through {' -> '.join(p.name for p in seen)}; remove one")
    try:
        plain = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} holds a {type(plain).__name__}, not keys with values; write for example steps: 60")
    tree = OmegaConf.create(plain)
    parents = plain.get("extends") or []
    if not isinstance(parents, str | list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path.name}: extends must be a file name or a list of them, got {parents!r}")
    tree.pop("extends", None)
    result: Any = OmegaConf.create({})
    for parent in [parents] if isinstance(parents, str) else parents:
        other = path.parent / parent
        if not other.is_file():
            raise ConfigError(f"{path.name} extends {parent}, but there is no file {other}")
        result = OmegaConf.merge(result, _read(other, (*seen, path)))
    return _override_method(OmegaConf.merge(result, tree), tree)


def _override_method(merged: Any, tree: Any) -> Any:
    """A tree that names a method replaces the inherited one, since arguments of two methods do not mix."""
    if isinstance(tree.get("method"), DictConfig) and "name" in tree.method:
        merged.method = tree.method
    return merged


def _change(tree: Any, override: str) -> Any:
    """`key=value` as a tree; rewards.terms[0].weight=2 gives the whole list of `tree` with one entry changed."""
    key, value = override.split("=", 1)
    value = "null" if value.lower() == "none" else value
    key = re.sub(r"\.(\d+)(?=\.|\[|$)", r"[\1]", key)  # rewards.terms.0.weight is the same
    if "[" not in key:
        return OmegaConf.from_dotlist([f"{key}={value}"])
    where = key.split("[")[0]
    change = OmegaConf.create()
    OmegaConf.update(change, where, OmegaConf.select(tree, where))
    OmegaConf.update(change, key, OmegaConf.from_dotlist([f"value={value}"]).value, merge=True)
    return change


def _line(error: Any) -> str:
    """One problem as one line, with the dotted key and, for an unknown key, the nearest known one."""
    where = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        owner = _model_at(RunConfig, where[:-1])
        known = list(owner.model_fields) if owner else []
        place = f"key in {'.'.join(where[:-1])}" if len(where) > 1 else "key"
        return nearest(where[-1], known, place) if known else f"unknown key {'.'.join(where)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{'.'.join(where)} is missing; write a value for it"
    given = "" if error["type"] == "value_error" else f", got {error['input']!r}"
    return f"{'.'.join(where)}: {message}{given}" if where else message


def _model_at(model: type[BaseModel], where: Sequence[str]) -> type[BaseModel] | None:
    """The pydantic model that holds the keys below the path `where`."""
    current: Any = model
    for part in where:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = _inner(current.model_fields[part].annotation)
        elif not part.isdigit():
            return None
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _inner(annotation: Any) -> Any:
    """The model inside list[Model] or Model | None."""
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType):
        return next((_inner(a) for a in typing.get_args(annotation) if a is not type(None)), None)
    return annotation
