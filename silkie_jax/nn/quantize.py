"""Frozen weights in 8 bits: codes and one scale for each output channel, and the products with them.

A weight W [*out, in] becomes codes q and scales s [*out], W ~ s q: half the memory of bfloat16. There are two kinds.

int8   -127..127, symmetric absmax per channel as in LLM.int8() (arXiv 2208.07339), without its outliers: only weights
       are coded, never what they are multiplied with. About twice the error that computing in bfloat16 makes anyway.
fp8    e4m3 (arXiv 2209.05433), for GPUs that multiply these at twice the speed of bfloat16: what a weight is multiplied
       with is coded, too, with a scale for each row, and so are gradients: with such scales their range suffices, and
       e5m2 would be off by twice as much. Three to four times the error of int8.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from silkie_jax.nn.precision import precision

METHODS: dict[str, np.dtype] = {"int8": np.dtype(jnp.int8), "fp8": np.dtype(jnp.float8_e4m3fn)}
"""Types of codes by name."""
_SCALE = jnp.bfloat16


def is_code(dtype: DTypeLike) -> bool:
    """Whether arrays of this type are codes, which stand for nothing without their scales and are never cast."""
    return np.dtype(dtype) in METHODS.values()


def encode(
    weight: Float[np.ndarray, "*O I"], kind: DTypeLike = np.int8
) -> tuple[Num[np.ndarray, "*O I"], Float[np.ndarray, "*O"]]:
    """(codes of type `kind`, scales bfloat16) of a weight, on the host.

    The scale is rounded first and the codes are found with what it has become, so that its few bits cost no accuracy.
    """
    values, most = weight.astype(np.float32), _most(kind)
    scale = (np.abs(values).max(axis=-1) / most).astype(_SCALE)
    step = scale.astype(np.float32)[..., None]
    codes = values / np.where(step > 0, step, 1)
    if np.dtype(kind) == np.int8:
        codes = np.rint(codes)
    return np.clip(codes, -most, most).astype(kind), scale


def encode_array(
    weight: Float[Array, "*O I"], kind: DTypeLike = np.int8
) -> tuple[Num[Array, "*O I"], Float[Array, "*O"]]:
    """The same of an array of JAX, by the host's arithmetic: compilers divide in ways of their own.

    Of a weight that is being traced, as in `eval_shape`, there are only the shapes.
    """
    if isinstance(weight, jax.core.Tracer):
        return jnp.zeros(weight.shape, kind), jnp.zeros(weight.shape[:-1], _SCALE)
    codes, scale = encode(np.asarray(weight), kind)
    return jnp.asarray(codes), jnp.asarray(scale)


def decode(codes: Num[Array, "*O I"], scale: Float[Array, "*O"], dtype: DTypeLike) -> Float[Array, "*O I"]:
    """The weight that codes and scales stand for."""
    return codes.astype(dtype) * scale.astype(dtype)[..., None]


@jax.custom_vjp
def product(x: Float[Array, "... I"], codes: Num[Array, "*O I"], scale: Float[Array, "*O"]) -> Float[Array, "..."]:
    """x W^T in the type of `x`, for a weight that nobody trains.

    Kept for the backward pass are codes and scales, which are there anyway, and never a weight in another type.
    """
    return _contract(x, codes, (-1,), (-1,)) * scale.astype(x.dtype)


def _forward(x: Array, codes: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, codes, scale), (codes, scale)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    codes, scale = kept
    scaled = gradient * scale.astype(gradient.dtype)  # along the axes that are summed over
    return _contract(scaled, codes, tuple(range(-scale.ndim, 0)), tuple(range(scale.ndim))), None, None


product.defvjp(_forward, _backward)


def _contract(x: Array, codes: Array, of_x: tuple[int, ...], of_codes: tuple[int, ...]) -> Array:
    """The sum over these axes, the last ones of x, in the type of x. With codes in fp8 x meets them as such codes."""
    if codes.dtype == jnp.int8:
        return jnp.tensordot(x, codes.astype(x.dtype), axes=(of_x, of_codes), precision=precision(x.dtype))
    own, step = _rows(x, of_x, codes.dtype)
    # Asked for in the type of x: in float32 a product of bfloat16 training would be written out in twice the bytes.
    y = jnp.tensordot(own, codes, axes=(of_x, of_codes), preferred_element_type=x.dtype)
    step = step.reshape(*x.shape[: -len(of_x)], *(1,) * (codes.ndim - len(of_codes)))
    return (y.astype(jnp.float32) * step).astype(x.dtype)


def _rows(x: Float[Array, "..."], axes: tuple[int, ...], kind: DTypeLike) -> tuple[Array, Float[Array, "..."]]:
    """(codes, scales in float32) of what is summed over, one scale for each row. What is not finite stays so."""
    most = jnp.abs(x).max(axis=axes, keepdims=True).astype(jnp.float32)
    step = most / _most(kind)
    return (x.astype(jnp.float32) / jnp.where(step > 0, step, 1)).astype(kind), step


def _most(kind: DTypeLike) -> float:
    """The largest code; -128 is not used, so that signs are alike."""
    return 127 if np.dtype(kind) == np.int8 else float(jnp.finfo(kind).max)
