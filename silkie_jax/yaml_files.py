"""YAML files into typed dataclasses: an unknown key, a missing one or a value of the wrong kind is one clear line."""

import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from silkie_jax.errors import UserError

T = TypeVar("T")


def load_yaml(path: str | os.PathLike[str], schema: type[T]) -> T:
    """The dataclass `schema` filled from a YAML file; what the file does not name keeps its default.

    Nested dataclasses, lists and mappings of dataclasses are checked key by key. Fields without a default must be
    given. `${oc.env:...}` is refused in these files: keys are read from the environment by name, never stored.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing or of the wrong kind.
    """
    path = Path(path)
    try:
        given = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from None
    except Exception as e:  # yaml's own errors span several lines
        raise UserError(f"{path}: not valid YAML ({' '.join(str(e).split())})") from None
    if not isinstance(given, Mapping):
        raise UserError(f"{path}: expected keys and values")
    return make(given, schema, str(path))


def make(given: Mapping[Any, Any], schema: type[T], where: str = "config") -> T:
    """As `load_yaml`, from a mapping; `where` names it in errors."""
    given = json.loads(json.dumps(given, default=str))  # keys become texts, and what was stored as JSON reads the same
    _check(given, schema, where, "")
    _check_texts(given, where)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))  # type: ignore[return-value]
    except OmegaConfBaseException as e:
        key = getattr(e, "full_key", None)
        message = str(e).splitlines()[0]
        if "Missing mandatory value" in message or "MissingMandatoryValue" in type(e).__name__:
            raise UserError(f"{where}: {key} must be set") from None
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}") from None


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}


def _check(value: Any, annotation: Any, where: str, key: str) -> None:
    """Refuses what does not fit a field, and keys that a dataclass does not have, in words that say what would do."""
    optional = isinstance(annotation, types.UnionType)
    kind = next(arg for arg in typing.get_args(annotation) if arg is not type(None)) if optional else annotation
    origin = typing.get_origin(kind) or kind
    if kind is Any or (value is None and optional):
        return
    if dataclasses.is_dataclass(kind) or origin is dict:
        fits = isinstance(value, Mapping)
    elif origin is list:
        fits = isinstance(value, list)
    elif origin in (int, float):
        numbers: tuple[type, ...] = (int, float) if origin is float else (int,)
        fits = isinstance(value, numbers) and not isinstance(value, bool)
    else:
        fits = isinstance(value, bool if origin is bool else str | int | float)
    if not fits:
        found = (
            _WORDS.get(type(value), "keys and values") if isinstance(value, str | list | Mapping) else json.dumps(value)
        )
        raise UserError(
            f"{where}: {key} must be {_WORDS.get(origin, 'keys and values')}, not {found}"
        )  # no text: a key?
    if dataclasses.is_dataclass(kind):
        fields = {field.name: field.type for field in dataclasses.fields(kind)}
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


def _check_texts(given: Any, where: str, path: str = "") -> None:
    """Refuses what OmegaConf would replace: a secret of the environment could end up in a database."""
    if isinstance(given, Mapping):
        for key, value in given.items():
            _check_texts(value, where, f"{path}.{key}" if path else str(key))
    elif isinstance(given, list):
        for n, value in enumerate(given):
            _check_texts(value, where, f"{path}[{n}]")
    elif isinstance(given, str) and "${" in given:
        raise UserError(f"{where}: {path}: interpolation with ${{...}} is not supported here; write the value itself")
