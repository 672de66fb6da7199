"""silkie_jax: preference distillation of large vision-language models in JAX.

The public names load on first use, so that importing the package does not import JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from silkie_jax.errors import UserError

if TYPE_CHECKING:
    from silkie_jax.generation.generate import generate
    from silkie_jax.loading import load
    from silkie_jax.models.qwen_vl.image import read_image

_WHERE = {
    "load": "silkie_jax.loading",
    "generate": "silkie_jax.generation.generate",
    "read_image": "silkie_jax.models.qwen_vl.image",
}

__all__ = ["UserError", "generate", "load", "read_image"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'silkie_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
