"""The training configuration on disk: YAML over what its `extends` names, `key=value` overrides, and back."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from silkie_jax.errors import UserError
from silkie_jax.training.config import TrainConfig, complete
from silkie_jax.yaml_files import make, read_extended, read_yaml, with_overrides


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Reads YAML over the file that its `extends` names, applies `key=value` overrides, and checks everything.

    What depends on other keys is filled in.

    Raises:
      UserError: one line that names the key and the mend.
    """
    return make_config(with_overrides(read_extended(path), overrides), where=str(path))


def make_config(given: Any, where: str = "config") -> TrainConfig:
    """The checked configuration from a (nested) mapping."""
    config = make(given, TrainConfig, where, interpolate=True)
    if config.adapter and config.reference is None:
        config.reference = _reference_it_began_with(Path(config.run_dir, "config.yaml"))
    return complete(config, where)


def _reference_it_began_with(path: Path) -> str | None:
    """adapter_off of a run that began when this was the default with an adapter, too: it continues with it."""
    if not path.is_file():
        return None
    began = read_yaml(path)
    return "adapter_off" if began.get("adapter") and began.get("reference") == "adapter_off" else None


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    os.replace(temporary, path)


# Keys that may differ between the parts of one run: they do not change what is computed.
_FREE = re.compile(
    r"^(run_dir|workers|log_every|evaluate_every|evaluate_at_start|evaluate_with|checkpoint_every|keep_checkpoints|on_nonfinite|wandb|mesh\..*"
    r"|batch_tokens|remat|attention|features)$"
)


_PLACES = ("model", "corpus", "adapter")


def check_same_run(config: TrainConfig, path: Path, *, may_move: bool = False) -> TrainConfig:
    """The configuration that a run began with; refuses to continue it under another one, naming what differs.

    With `may_move` model, corpus and adapter may lie elsewhere: their contents are compared instead (run_file.py).
    """
    began = make_config(read_yaml(path), str(path))
    before, now = (_flat(dataclasses.asdict(c)) for c in (began, config))
    moved = [k for k in _PLACES if may_move and before[k] and now[k]]
    # Keys of either: an option that a rule had before may be absent now.
    keys = [k for k in {**now, **before} if not _FREE.match(k) and k not in moved]
    different = [k for k in keys if before.get(k) != now.get(k)]
    if different:
        changes = ", ".join(f"{k} was {before.get(k)!r} and is {now.get(k)!r}" for k in different)
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
