"""Read a `RunConfig` from YAML, with `extends` and dotted overrides; each problem names its key and what to write."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from flowbp_ray.config import yaml_text
from flowbp_ray.config.schema import RunConfig
from flowbp_ray.utils.addresses import expand
from flowbp_ray.utils.errors import ConfigError, nearest
from flowbp_ray.utils.secrets import check_no_secrets
from flowbp_ray.utils.text_files import check_unicode, read_text, shown

MOST, LONGEST = 4, 400  # problems in a message, and their characters


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML at `path` (or the shipped one of that name), apply `key=value` overrides, and validate."""
    found = _find(Path(expand(str(path))))
    tree = _read(found, ())
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {shown(override)} is not key=value; write for example "
                              "learners.optimizer.lr=1e-4")  # fmt: skip
        try:
            change = _change(tree, override)
            same = OmegaConf.select(change, "method.name") == OmegaConf.select(tree, "method.name")
            tree = OmegaConf.merge(tree, change) if same else _override_method(OmegaConf.merge(tree, change), change)
        except (OmegaConfBaseException, TypeError, IndexError, ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(f"override {shown(override)} cannot be applied: {_first_line(error)}") from error
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{found}: {_unresolved(error)}") from error
    assert isinstance(plain, dict)
    return validate({str(k): v for k, v in plain.items()}, f"{found}: ", overrides)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _unresolved(error: Exception) -> str:
    """What is wrong with a ${...}: it stands for another key, and only `oc.env` for a variable of the environment."""
    key = getattr(error, "full_key", None)
    where = f"{key}: " if key else ""
    advice = "${key} stands for another key; write ${oc.env:HOME} for $HOME, and \\${ for the characters themselves"
    return f"{where}{_first_line(error)}; {advice}"


def validate(plain: dict[str, Any], where: str = "", overrides: Sequence[str] = ()) -> RunConfig:
    """Validate a plain tree. Raises ConfigError, one line with all problems.

    where: begins it, such as a file. overrides: `key=value` that were applied; one with a problem is named instead.
    """
    try:
        check_unicode(plain, "the configuration")
        check_no_secrets(plain)  # before a message could show one
        return RunConfig.model_validate(plain)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        blamed = [_override_of(one, overrides) for one in faults]
        problems = [_line(one, override) for one, override in zip(faults, blamed, strict=True)]
        if all(blamed):
            where = f"override {shown(blamed[0])}: " if len(set(blamed)) == 1 else "overrides: "
        most = max(n for n in range(1, MOST + 1) if n == 1 or sum(map(len, problems[:n])) <= LONGEST)
        more = f"; and {len(problems) - most} more" if len(problems) > most else ""
        raise ConfigError(f"{where}{'; '.join(problems[:most])}{more}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{where}{_first_line(error)}") from error


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML, which `load` reads back to the same value."""
    return yaml_text.dump(_escaped(config.model_dump(mode="json")))


def quoted(text: str) -> str:
    """A text as the value of an override, which is read back as it is: a path may look like a list, or hold a ${."""
    return json.dumps(_escaped(text), ensure_ascii=False)


def _escaped(value: Any) -> Any:
    """The value with each ${ in a text escaped, so that it is not resolved a second time."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list) else value


def shipped() -> Path:
    """The folder of the configurations that come with the package."""
    import configs

    return Path(next(iter(configs.__path__)))


def _find(path: Path) -> Path:
    for candidate in (path, *_shipped_as(path)):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a configuration; write the YAML file in it")
    known = [p.stem for p in (shipped() / "runs").glob("*.yaml")]
    name = path.stem if path.suffix in (".yaml", ".yml") else path.name
    raise ConfigError(f"{nearest(name, known, 'config')} (no file {path})")


def _shipped_as(path: Path) -> tuple[Path, Path]:
    """Where a shipped configuration of that name would be: below configs/, or a run's."""
    return shipped() / path, shipped() / "runs" / path.with_suffix(".yaml").name if path.name else shipped() / path


def _read(path: Path, seen: tuple[Path, ...]) -> Any:
    shown_path, path = path, path.resolve()
    if path in seen:
        raise ConfigError(f"{path.name} extends itself through {' -> '.join(p.name for p in seen)}; remove one")
    try:
        plain = yaml_text.parse(read_text(path, str(shown_path))) or {}
    except ValueError as error:
        said = str(error)
        raise ConfigError(said if said.startswith(str(shown_path)) else f"{shown_path} is not YAML: {said}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} holds a {type(plain).__name__}, not keys with values; write for example steps: 60")
    parents = plain.get("extends") or []
    if not isinstance(parents, str | list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path.name}: extends must be a file name or a list of them, got {shown(parents)}")
    try:
        tree = OmegaConf.create({key: value for key, value in plain.items() if key != "extends"})
        result: Any = OmegaConf.create({})
        for parent in [parents] if isinstance(parents, str) else parents:
            result = OmegaConf.merge(result, _read(_parent(path, parent), (*seen, path)))
        return _override_method(OmegaConf.merge(result, tree), tree)
    except (OmegaConfBaseException, RecursionError, TypeError) as error:
        raise ConfigError(f"{shown_path}: {_unread(error)}") from error


def _parent(path: Path, parent: str) -> Path:
    """The file that `path` extends: beside it, or a shipped one of that name."""
    beside = path.parent / expand(parent)
    for candidate in (beside, *_shipped_as(Path(parent))):
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{path.name} extends {shown(parent)}, but there is no file {beside}; write its path, or the "
                      f"name of one in {shipped() / 'runs'}")  # fmt: skip


def _unread(error: BaseException) -> str:
    """What OmegaConf refuses in a file: a tag such as !!binary, a key that is no word, a broken ${...}."""
    key = getattr(error, "full_key", None)
    where = f"{key}: " if key else ""
    if "not a supported primitive type" in str(error):
        return (
            f"{where}{_first_line(error)}; write numbers, words, lists and mappings, and put other values into quotes"
        )
    if "key type" in str(error):
        return f"{where}{_first_line(error)}; write a word before each colon"
    if type(error).__name__ == "GrammarParseError":
        return _unresolved(error)  # type: ignore[arg-type]
    return f"{where}{_first_line(error)}"


def _override_method(merged: Any, tree: Any) -> Any:
    """A tree that names a method replaces the inherited one, since arguments of two methods do not mix."""
    if isinstance(tree.get("method"), DictConfig) and "name" in tree.method:
        merged.method = tree.method
    return merged


def _change(tree: Any, override: str) -> Any:
    """`key=value` as a tree; rewards.terms[0].weight=2 gives the whole list of `tree` with one entry changed."""
    key, value = override.split("=", 1)
    if not key.strip():
        raise ValueError("the key is missing; write key=value")
    parsed = None if value.lower() == "none" else yaml_text.parse_value(value)
    key = re.sub(r"\.(\d+)(?=\.|\[|$)", r"[\1]", key)  # rewards.terms.0.weight is the same
    if "[" not in key:
        change = OmegaConf.create()
        OmegaConf.update(change, key, parsed)
        return change
    where = key.split("[")[0]
    change = OmegaConf.create()
    OmegaConf.update(change, where, OmegaConf.select(tree, where))
    OmegaConf.update(change, key, parsed, merge=True)
    return change


def _override_of(error: Any, overrides: Sequence[str]) -> str | None:
    """The last of the `key=value` that set the key that a problem is about, if any did."""
    where = [str(part) for part in error["loc"]]
    said = error["msg"].removeprefix("Value error, ").split(" ")[0]  # checks of a section begin with the key
    for override in reversed(overrides):
        key = re.sub(r"\[(\d+)\]", r".\1", override.split("=", 1)[0].strip()).split(".")
        if where[: len(key)] == key or [*where, said] == key:
            return override
    return None


def _line(error: Any, override: str | None = None) -> str:
    """One problem as one line, with the dotted key and, for an unknown key, the nearest known one."""
    where = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        owner = _model_at(RunConfig, where[:-1])
        known = list(owner.model_fields) if owner else []
        place = f"key in {'.'.join(where[:-1])}" if len(where) > 1 else "key"
        return nearest(where[-1], known, place) if known else f"unknown key {'.'.join(where)}"
    message = " ".join(error["msg"].removeprefix("Value error, ").split())
    if error["type"] == "missing":
        return f"{'.'.join(where)} is missing; write a value for it"
    given = "" if error["type"] == "value_error" else f", got {shown(error['input'])}"
    if error["type"] == "string_type" and isinstance(error["input"], bool | int | float):
        written = override.split("=", 1)[1] if override else error["input"]
        given += f"; put it into quotes: '\"{written}\"'" if override else f'; put it into quotes: "{written}"'
    if error["type"].endswith("_type") and error["input"] is None:
        given = ", got nothing; write a value"
    if error["type"] == "string_pattern_mismatch" and where == ["name"]:
        message = "must be letters, digits and any of . _ + -, since a folder is called by it"
    if error["type"] in ("dict_type", "model_type"):
        message = "must be a mapping"
        given += "; write {name: value}"
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
