"""What weights and adapters are known by, wherever they lie: hashes over checksums that are made on the devices.

A fingerprint takes one pass over memory, and is the same however the arrays are stored or sharded. It tells models
apart; it is no defence against somebody who forges one.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt

from silkie_jax.checkpoints.weights import ShardingOf, stream_part
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.nn.lora import linears
from silkie_jax.nn.quantize import is_code


def weights_fingerprint(model: QwenVL, dtype: jnp.dtype | None = None, tower: bytes = b"") -> str:
    """Of the base weights as they are computed with, cast to `dtype` (None: as they are). Adapters do not count.

    Where the model lacks its vision tower, `tower` are that one's `checksums`: the fingerprint is the whole model's.
    """
    return hashlib.sha256(checksums(model, dtype) + tower).hexdigest()


def checksums(model: QwenVL, dtype: jnp.dtype | None = None) -> bytes:
    """A line for each array of the base weights; the tower's lines follow the decoder's."""
    flat = sorted(nnx.to_flat_state(nnx.state(model, nnx.Param)), key=lambda item: item[0])
    return b"".join(
        _line(".".join(map(str, path)), variable[...], dtype)
        for path, variable in flat
        if not isinstance(variable, nnx.LoRAParam)
    )


class Tower(NamedTuple):
    """A vision tower's `checksums`: as a run would keep it, and as it would compute with it."""

    kept: bytes
    computed: bytes


def tower_checksums(
    path: str | Path,
    dtype: str,
    param_dtype: str,
    sharding_of: ShardingOf | None = None,
    quantize: str | None = None,
) -> Tower:
    """Of the vision tower of a model folder, one array after another, of which none stays.

    Raises:
      UserError: all that is wrong with the folder, in one line.
    """
    lines = {
        keys: tuple(_line(".".join(keys), array, kind) for kind in (None, jnp.dtype(dtype)))
        for keys, array in stream_part(path, "visual", param_dtype, sharding_of, quantize)
    }
    kept, computed = zip(*(lines[keys] for keys in sorted(lines)), strict=True)
    return Tower(b"".join(kept), b"".join(computed))


def adapter_fingerprint(model: QwenVL) -> str | None:
    """Of the adapter that the model carries, None where it carries none."""
    adapted = [(name, linear) for name, linear in linears(model.language.layers) if linear.lora_a is not None]
    digest = hashlib.sha256()
    for name, linear in sorted(adapted):
        digest.update(f"{name} {float(linear.lora_scale)}\n".encode())
        for factor in (linear.lora_a, linear.lora_b):
            digest.update(_line(name, factor[...]))
    return digest.hexdigest() if adapted else None


SMALL = 2**22
"""Bytes up to which an array's checksum is made on the host: each shape would be a program of its own to compile."""


def _line(name: str, array: Array, dtype: jnp.dtype | None = None) -> bytes:
    kept = dtype is None or is_code(array.dtype)
    kind = jnp.dtype(array.dtype if kept else dtype)
    if array.nbytes <= SMALL and array.is_fully_addressable:
        with np.errstate(over="ignore"):
            place = np.arange(array.size, dtype=np.uint32).reshape(array.shape)
            sums = _checksums(np.asarray(array), place, kind)
    else:
        sums = _compiled(array, kind)
    return f"{name} {array.shape} {[int(x) for x in sums]}\n".encode()


def _checksums(x: Any, place: Any, dtype: jnp.dtype) -> tuple[Any, Any]:
    """Sums, modulo 2^32, of every element's bits mixed with its place, by NumPy or by JAX as the arrays are."""
    bits = x.astype(dtype).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[dtype.itemsize])
    mixed = bits.astype(np.uint32) ^ (place * np.uint32(0x9E3779B1))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return mixed.sum(dtype=np.uint32), (mixed ^ (mixed >> 16)).sum(dtype=np.uint32)


@partial(jax.jit, static_argnums=1)
def _compiled(x: Array, dtype: jnp.dtype) -> tuple[UInt[Array, ""], UInt[Array, ""]]:
    # Axis by axis: each device counts the places of its own shard, and no array of them all is made.
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return _checksums(x, place, dtype)
