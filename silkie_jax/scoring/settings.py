"""What a training configuration says about what is computed beforehand, and which parts of that are still to do."""

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from silkie_jax.models.qwen_vl.null_image import NullImage
from silkie_jax.scoring.store import Store


class MeshSizes(Protocol):
    """Devices along each axis (hardware/mesh.py)."""

    data: int
    fsdp: int
    tensor: int


class Settings(Protocol):
    """What log-probabilities of the reference and features of images depend on, and how they are computed."""

    model: str
    adapter: str | None
    corpus: str
    dtype: str
    features: str
    quantize: str | None
    compute: str | None
    max_length: int
    max_prompt_length: int | None
    batch_rows: int
    batch_tokens: int | None
    workers: int
    attention: str

    @property
    def codes(self) -> str | None: ...

    @property
    def mesh(self) -> MeshSizes: ...

    @property
    def stored_null_image(self) -> NullImage | None: ...

    @property
    def encoded_null_images(self) -> Sequence[NullImage]: ...


def numerics(config: Settings) -> dict[str, str]:
    """How frozen weights are kept and multiplied, where it is not as `dtype` says: part of what stored numbers are."""
    keys = {"quantize": config.quantize, "compute": config.compute}
    return {key: value for key, value in keys.items() if value}


def missing_parts(store: Store) -> list[int]:
    """Parts that are still to be computed, the same on all hosts, whatever each sees of a shared disk."""
    missing = store.missing()
    if jax.process_count() == 1:
        return missing
    flags = jnp.array([part in missing for part in range(store.parts)])
    return jnp.flatnonzero(multihost_utils.broadcast_one_to_all(flags)).tolist()
