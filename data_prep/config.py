"""YAML files into typed dataclasses: an unknown key, a missing one or a value of the wrong kind is one clear line."""

import dataclasses
import difflib
import json
import os
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
    _check_keys(given, schema, where)
    _check_texts(given, where)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))  # type: ignore[return-value]
    except OmegaConfBaseException as e:
        key = getattr(e, "full_key", None)
        message = str(e).splitlines()[0]
        if "Missing mandatory value" in message or "MissingMandatoryValue" in type(e).__name__:
            raise UserError(f"{where}: {key} must be set") from None
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}") from None


def _check_keys(given: Mapping[Any, Any], schema: type, where: str, prefix: str = "") -> None:
    """Refuses keys that a dataclass, or one nested in it, does not have."""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in given.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; there are {', '.join(fields)}"
            raise UserError(f"{where}: unknown key {prefix}{key}{hint}")
        inner = _dataclass_in(fields[key].type)
        if inner is None:
            continue
        if isinstance(value, list):
            nested = {f"{prefix}{key}[{n}].": item for n, item in enumerate(value)}
        elif "dict" in str(fields[key].type) and isinstance(value, Mapping):
            nested = {f"{prefix}{key}.{name}.": item for name, item in value.items()}
        else:
            nested = {f"{prefix}{key}.": value}
        for path, item in nested.items():
            if isinstance(item, Mapping):
                _check_keys(item, inner, where, path)


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


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass of `C`, `C | None`, `list[C]` or `dict[str, C]`; None for anything else."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    return next((found for arg in getattr(annotation, "__args__", ()) if (found := _dataclass_in(arg))), None)
