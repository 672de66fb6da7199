"""YAML files into typed dataclasses, by one reader: an unknown key, or a value of the wrong kind, is one clear line."""

import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from silkie_jax.errors import UserError

T = TypeVar("T")


def read_yaml(path: str | os.PathLike[str]) -> DictConfig:
    """The keys and values of a YAML file as they stand there; none of an empty one.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        given = OmegaConf.load(Path(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from None
    except Exception as e:  # yaml's own errors span several lines
        raise UserError(f"{path}: not valid YAML ({' '.join(str(e).split())})") from None
    if not isinstance(given, DictConfig):
        raise UserError(f"{path}: expected keys and values")
    return given


def read_extended(path: str | os.PathLike[str], above: tuple[Path, ...] = ()) -> DictConfig:
    """As `read_yaml`, over the file that its `extends` names, if it has one (a path from its own folder).

    Raises:
        UserError: a file cannot be read, or extends itself.
    """
    path = Path(path)
    given = read_yaml(path)
    base = given.pop("extends", None)
    if base is None:
        return given
    chain = (*above, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise UserError(f"{path}: extends {base}, which extends it")
    merged = OmegaConf.merge(read_extended(path.parent / base, chain), given)
    assert isinstance(merged, DictConfig)
    return merged


def with_overrides(given: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """Keys and values, some of them replaced by those of `key=value` texts.

    Raises:
        UserError: a text has another form.
    """
    merged = OmegaConf.merge(given, *map(_parse_override, overrides))
    assert isinstance(merged, DictConfig)
    return merged


def _parse_override(item: str) -> Any:
    key, equals, _ = item.partition("=")
    if not (key and equals):
        raise UserError(f"{item!r} is not an override; write key=value")
    try:
        return OmegaConf.from_dotlist([item])
    except Exception as e:  # yaml's own errors span several lines
        raise UserError(f"{item!r}: the value is not valid YAML ({' '.join(str(e).split())})") from None


def load_yaml(path: str | os.PathLike[str], schema: type[T]) -> T:
    """The dataclass `schema` filled from a YAML file, as `make` does.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing or of the wrong kind.
    """
    return make(read_yaml(path), schema, str(path))


def make(
    given: Mapping[Any, Any] | DictConfig, schema: type[T], where: str = "config", *, interpolate: bool = False
) -> T:
    """The dataclass `schema` filled from a mapping; what that does not name keeps its default.

    Nested dataclasses, lists and mappings of dataclasses are checked key by key. Fields without a default must be
    given.

    Args:
        given: keys and values, nested.
        schema: the dataclass.
        where: names the mapping in errors.
        interpolate: whether `${...}` is filled in as OmegaConf does. Otherwise it is refused: what it takes from the
            environment, a key for one, could end up in a database.

    Raises:
        UserError: a key is unknown, missing or of the wrong kind.
    """
    values = OmegaConf.to_container(given) if isinstance(given, DictConfig) else given
    values = json.loads(json.dumps(values, default=str))  # keys become texts; what was stored as JSON reads the same
    if not interpolate:
        _refuse_interpolation(values, where)
    _check(values, schema, where, "")
    try:
        filled = OmegaConf.structured(schema)
        filled.update({key: None for key, value in values.items() if value is None})  # merging null changes nothing
        return OmegaConf.to_object(OmegaConf.merge(filled, values))  # type: ignore[return-value]
    except OmegaConfBaseException as e:
        key = getattr(e, "full_key", None)
        message = str(e).splitlines()[0]
        if "Missing mandatory value" in message or "MissingMandatoryValue" in type(e).__name__:
            raise UserError(f"{where}: {key} must be set") from None
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}") from None


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}
_KEYS = "keys and values"


def _check(value: Any, annotation: Any, where: str, key: str) -> None:
    """Refuses what does not fit a field, and keys that a dataclass does not have, in words that say what would do."""
    optional = isinstance(annotation, types.UnionType)
    kind = next(arg for arg in typing.get_args(annotation) if arg is not type(None)) if optional else annotation
    origin = typing.get_origin(kind) or kind
    if kind is Any or (value is None and optional) or _is_interpolation(value):
        return
    fields = {field.name: field.type for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
    if fields or origin is dict:
        fits = isinstance(value, Mapping)
    elif origin is list:
        fits = isinstance(value, list)
    elif origin in (int, float):
        numbers: tuple[type, ...] = (int, float) if origin is float else (int,)
        fits = isinstance(value, numbers) and not isinstance(value, bool)
    else:
        fits = isinstance(value, bool if origin is bool else str | int | float)
    if not fits:
        wanted = f"hold keys, such as {key}.{next(iter(fields))}" if fields else f"be {_WORDS.get(origin, _KEYS)}"
        # A text is not shown: it could be a key.
        found = _WORDS.get(type(value), _KEYS) if isinstance(value, str | list | Mapping) else json.dumps(value)
        raise UserError(f"{where}: {key} must {wanted}, not {found}")
    if fields:
        for name, item in value.items():
            path = f"{key}.{name}" if key else name
            if name not in fields:
                near = difflib.get_close_matches(name, fields, n=1)
                hint = f"did you mean {path.removesuffix(name)}{near[0]}?" if near else f"there are {', '.join(fields)}"
                raise UserError(f"{where}: unknown key {path}; {hint}")
            _check(item, fields[name], where, path)
    elif origin is dict:
        for name, item in value.items():
            _check(item, typing.get_args(kind)[1], where, f"{key}.{name}")
    elif origin is list:
        for number, item in enumerate(value):
            _check(item, typing.get_args(kind)[0], where, f"{key}[{number}]")


def _is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _refuse_interpolation(given: Any, where: str, path: str = "") -> None:
    if isinstance(given, Mapping):
        for key, value in given.items():
            _refuse_interpolation(value, where, f"{path}.{key}" if path else str(key))
    elif isinstance(given, list):
        for n, value in enumerate(given):
            _refuse_interpolation(value, where, f"{path}[{n}]")
    elif _is_interpolation(given):
        raise UserError(f"{where}: {path}: interpolation with ${{...}} is not supported here; write the value itself")
