"""Frozen weights in 8 bits: codes and one scale for each output channel, and the product with them.

A weight W [*out, in] becomes codes q in -127..127 and scales s [*out], W ~ s q: half the memory of bfloat16, for about
twice the error that computing in bfloat16 makes anyway (symmetric absmax per channel, as in LLM.int8(), arXiv
2208.07339, without its outliers: only weights are coded, never what they are multiplied with).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from silkie_jax.nn.precision import precision

METHODS = ("int8",)
_MOST = 127  # and not -128, so that signs are alike
_SCALE = jnp.bfloat16


def encode(weight: Float[np.ndarray, "*O I"]) -> tuple[Int8[np.ndarray, "*O I"], Float[np.ndarray, "*O"]]:
    """(codes int8, scales bfloat16) of a weight, on the host.

    The scale is rounded first and the codes are found with what it has become, so that its few bits cost no accuracy.
    """
    values = weight.astype(np.float32)
    scale = (np.abs(values).max(axis=-1) / _MOST).astype(_SCALE)
    step = scale.astype(np.float32)[..., None]
    codes = np.clip(np.rint(values / np.where(step > 0, step, 1)), -_MOST, _MOST)
    return codes.astype(np.int8), scale


def encode_array(weight: Float[Array, "*O I"]) -> tuple[Int8[Array, "*O I"], Float[Array, "*O"]]:
    """The same of an array of JAX, by the host's arithmetic: compilers divide in ways of their own.

    Of a weight that is being traced, as in `eval_shape`, there are only the shapes.
    """
    if isinstance(weight, jax.core.Tracer):
        return jnp.zeros(weight.shape, jnp.int8), jnp.zeros(weight.shape[:-1], _SCALE)
    codes, scale = encode(np.asarray(weight))
    return jnp.asarray(codes), jnp.asarray(scale)


def decode(codes: Int8[Array, "*O I"], scale: Float[Array, "*O"], dtype: jnp.dtype) -> Float[Array, "*O I"]:
    """The weight that codes and scales stand for."""
    return codes.astype(dtype) * scale.astype(dtype)[..., None]


@jax.custom_vjp
def product(x: Float[Array, "... I"], codes: Int8[Array, "*O I"], scale: Float[Array, "*O"]) -> Float[Array, "..."]:
    """x W^T in the type of `x`, for a weight that nobody trains.

    Kept for the backward pass are codes and scales, which are there anyway, and never a weight in another type.
    """
    y = jnp.tensordot(x, codes.astype(x.dtype), axes=(-1, -1), precision=precision(x.dtype))
    return y * scale.astype(x.dtype)


def _forward(x: Array, codes: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, codes, scale), (codes, scale)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    codes, scale = kept
    out = tuple(range(-scale.ndim, 0)), tuple(range(scale.ndim))
    scaled = gradient * scale.astype(gradient.dtype)  # along the axes that are summed over
    dx = jnp.tensordot(scaled, codes.astype(gradient.dtype), axes=out, precision=precision(gradient.dtype))
    return dx, None, None


product.defvjp(_forward, _backward)
