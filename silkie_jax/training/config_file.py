"""The training configuration on disk: YAML over what its `extends` names, `key=value` overrides, and back."""

import dataclasses
import difflib
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from silkie_jax.errors import UserError
from silkie_jax.training.config import TrainConfig, complete


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Reads YAML over the file that its `extends` names, applies `key=value` overrides, and checks everything.

    What depends on other keys is filled in.

    Raises:
      UserError: one line that names the key and the mend.
    """
    given = _read_yaml(Path(path))
    return make_config(OmegaConf.merge(given, *map(_parse_override, overrides)), where=str(path))


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> DictConfig:
    """A YAML file over the one that its `extends` names, if it has one (a path from its own folder)."""
    try:
        given = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from None
    except Exception as e:  # yaml's own errors span several lines
        raise UserError(f"{path}: not valid YAML ({' '.join(str(e).split())})") from None
    if not isinstance(given, DictConfig):
        raise UserError(f"{path}: expected keys and values")
    base = given.pop("extends", None)
    if base is None:
        return given
    chain = (*above, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise UserError(f"{path}: extends {base}, which extends it")
    merged = OmegaConf.merge(_read_yaml(path.parent / base, chain), given)
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


def make_config(given: Any, where: str = "config") -> TrainConfig:
    """The checked configuration from a (nested) mapping."""
    schema = OmegaConf.structured(TrainConfig)
    given = OmegaConf.create(given)
    _check_keys(given, schema, where)
    try:
        if given.get("lora", "") is None:  # a merge would keep the default's fields
            schema.lora = None
        config: TrainConfig = OmegaConf.to_object(OmegaConf.merge(schema, given))  # type: ignore[assignment]
    except OmegaConfBaseException as e:
        key = getattr(e, "full_key", None)
        message = str(e).splitlines()[0]
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}") from None
    if config.adapter and config.reference is None:
        config.reference = _reference_it_began_with(Path(config.run_dir, "config.yaml"))
    return complete(config, where)


def _reference_it_began_with(path: Path) -> str | None:
    """adapter_off of a run that began when this was the default with an adapter, too: it continues with it."""
    if not path.is_file():
        return None
    began = _read_yaml(path)
    return "adapter_off" if began.get("adapter") and began.get("reference") == "adapter_off" else None


def _check_keys(given: Any, schema: Any, where: str, prefix: str = "") -> None:
    for key in given:
        if key not in schema:
            near = difflib.get_close_matches(str(key), list(schema), n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; there are {', '.join(schema)}"
            raise UserError(f"{where}: unknown key {prefix}{key}{hint}")
        if OmegaConf.is_dict(schema[key]):
            if OmegaConf.is_dict(given[key]):
                _check_keys(given[key], schema[key], where, f"{prefix}{key}.")
            elif not (key == "lora" and given[key] is None):
                first = next(iter(schema[key]))
                raise UserError(f"{where}: {key} must hold keys, such as {key}.{first}, and not {given[key]!r}")


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    os.replace(temporary, path)


# Keys that may differ between the parts of one run: they do not change what is computed.
_FREE = re.compile(
    r"^(run_dir|workers|log_every|evaluate_every|evaluate_at_start|checkpoint_every|keep_checkpoints|on_nonfinite|wandb|mesh\..*"
    r"|batch_tokens|remat|attention)$"
)


def check_same_run(config: TrainConfig, path: Path) -> TrainConfig:
    """The configuration that a run began with; refuses to continue it under another one, naming what differs."""
    began = make_config(OmegaConf.load(path), str(path))
    before, now = (_flat(dataclasses.asdict(c)) for c in (began, config))
    different = [k for k in now if before.get(k) != now[k] and not _FREE.match(k)]
    if different:
        changes = ", ".join(f"{k} was {before.get(k)!r} and is {now[k]!r}" for k in different)
        raise UserError(f"{path.parent} holds another run: {changes}; use a new run_dir or the old values")
    return began


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
