"""What a checkpoint says about sampling, for whoever does not say."""

import json
from dataclasses import dataclass
from pathlib import Path

from silkie_jax.errors import UserError


@dataclass(frozen=True)
class Defaults:
    """Of a checkpoint without generation_config.json: as Qwen-VL-Chat's."""

    temperature: float = 1.0
    top_p: float = 0.5
    max_new_tokens: int = 512


def read_defaults(folder: str | Path) -> Defaults:
    """The defaults in a checkpoint's generation_config.json.

    Raises:
      UserError: the file is damaged.
    """
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return Defaults()
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        return Defaults(
            temperature=float(given.get("temperature") or 1.0) if given.get("do_sample", True) else 0.0,
            top_p=float(given.get("top_p", Defaults.top_p)),
            max_new_tokens=int(given.get("max_new_tokens", Defaults.max_new_tokens)),
        )
    except (ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a sound generation config ({' '.join(str(e).split())})") from None
