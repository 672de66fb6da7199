"""Attention with the branch mask in one pass, for TPU and GPU: no [T, T] array exists in the device's memory.

FlashAttention-2 (arXiv 2307.08691) as one Pallas kernel for both platforms. The mask is made inside, block by block,
from the tokens' branches, by the same rule as that of the plain path (attention.py). A program computes one block of
queries (or, for the gradient of keys and values, of keys) of one head and walks over the blocks of the other side, but
for those beyond the diagonal. Rows are some thousands of tokens long at most, so that the keys and values of a head fit
into the memory on a TPU's chip as a whole.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from silkie_jax.nn.precision import precision

FLASH = "flash"  # checkpoint name of what the gradient needs of the forward pass
MASKED = -1e30  # finite, so that a row that sees nothing makes no NaN
_NT = (((1,), (1,)), ((), ()))  # x y^T
_NN = (((1,), (0,)), ((), ()))

Visible = Callable[[jax.Array, jax.Array], jax.Array]


class Form(NamedTuple):
    """What a kernel is compiled for. Blocks divide the padded lengths."""

    platform: str  # tpu, gpu, or interpret: the same kernel on any platform, slowly, for tests
    scale: float
    queries: int  # tokens of a block
    keys: int
    length: int  # keys that are not padding of this module's own
    visible: Visible | None  # (ids of queries, ids of keys) -> mask; None: everybody sees everybody

    def key_blocks(self, i: jax.Array, count: int) -> Any:
        """How many of `count` blocks of keys the queries of block i see something of."""
        if self.visible is None:
            return count
        return jax.lax.div((i + 1) * self.queries + (self.keys - 1), jnp.int32(self.keys))

    def first_query_block(self, j: jax.Array) -> Any:
        """The first block of queries that sees something of block j of keys."""
        return 0 if self.visible is None else jax.lax.div(j * self.keys, jnp.int32(self.queries))


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S H D"],
    v: Float[Array, "B S H D"],
    ids: Int[Array, "B T"] | None = None,
    visible: Visible | None = None,
    *,
    platform: str,
    most: tuple[int, int] | None = None,
) -> Float[Array, "B T H D"]:
    """softmax(q k^T / sqrt(D)) v; a query that sees nothing gets zeros.

    With `visible` attention is causal and restricted to visible(ids of queries [t, 1], ids of keys [1, s]).
    `platform` is tpu, gpu or interpret; `most` the largest block of queries and of keys that a small chip has room for.
    """
    tokens, keys, width = q.shape[1], k.shape[1], q.shape[-1]
    best = _BLOCKS.get((platform, q.dtype.itemsize), _BLOCKS[platform, None])
    most_q, most_k = map(min, best, most or best)
    block_q, block_k = _block(tokens, most_q), _block(keys, most_k)
    form = Form(platform, 1 / math.sqrt(width), block_q, block_k, keys, visible)
    # The diagonal must end in the last blocks of both.
    pad_q, pad_k = (max(block_q, block_k),) * 2 if visible is not None else (block_q, block_k)

    def laid_out(x: jax.Array, multiple: int) -> jax.Array:  # [B, H, T, D], padded to whole blocks and lanes
        pad = -x.shape[1] % multiple, _padded_width(platform, width) - width
        return jnp.pad(x, ((0, 0), (0, pad[0]), (0, 0), (0, pad[1]))).swapaxes(1, 2)

    if ids is not None:
        ids = jnp.pad(ids, ((0, 0), (0, -tokens % pad_q)), constant_values=-1)[:, None]
    out = _flash(form, laid_out(q, pad_q), laid_out(k, pad_k), laid_out(v, pad_k), ids)
    return out.swapaxes(1, 2)[:, :tokens, :, :width]


# The most queries and keys of a block, by platform and bytes of a number. On GPU those with which ptxas spills no
# registers on Hopper and Triton multiplies by wgmma (with 8 warps); on TPU those that splash attention is tuned to.
_BLOCKS: dict[tuple[str, int | None], tuple[int, int]] = {
    ("tpu", None): (512, 512),
    ("gpu", 2): (128, 64),
    ("gpu", None): (32, 32),
    ("interpret", None): (64, 32),
}


def _block(length: int, most: int) -> int:
    """A power of two that pads little of `length`; at least 128, a TPU's lanes, where `most` allows it."""
    size = most
    while size > min(most, 128) and -length % size > length // 8:
        size //= 2
    return size


def _padded_width(platform: str, width: int) -> int:
    return -(-width // 128) * 128 if platform == "tpu" else max(16, pl.next_power_of_2(width))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(form: Form, q: Array, k: Array, v: Array, ids: Array | None) -> Float[Array, "B H T D"]:
    return _forward(form, q, k, v, ids)[0]


def _flash_forward(form: Form, q: Array, k: Array, v: Array, ids: Array | None) -> tuple[Array, tuple]:
    out, total = (checkpoint_name(x, FLASH) for x in _forward(form, q, k, v, ids))
    return out, (q, k, v, ids, out, total)


def _flash_backward(form: Form, kept: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, ids, out, total = kept
    delta = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1)[:, :, None]
    dq = _query_gradient(form, q, k, v, ids, gradient, total, delta)
    dk, dv = _key_gradient(form, q, k, v, ids, gradient, total, delta)
    return dq, dk, dv, None


_flash.defvjp(_flash_forward, _flash_backward)


def _forward(
    form: Form, q: Float[Array, "B H T D"], k: Float[Array, "B H S D"], v: Float[Array, "B H S D"], ids: Array | None
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H 1 T"]]:
    """The output, and the log of each query's sum of exponentials."""

    def kernel(i: jax.Array, q_ref: Any, k_ref: Any, v_ref: Any, ids_ref: Any, out_ref: Any, total_ref: Any) -> None:
        q = q_ref[...]
        own = None if ids_ref is None else _column(form, ids_ref[:, _part(i, form.queries)])

        def body(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, top, total = carry
            at = _part(j, form.keys)
            scores = _dot(q, k_ref[at, :], _NT) * form.scale
            mask = _mask(form, own, None if ids_ref is None else ids_ref[:, at], i, j, keys_axis=1)
            if mask is not None:
                scores = jnp.where(mask, scores, MASKED)
            higher = jnp.maximum(top, scores.max(1, keepdims=True))
            p = jnp.exp(scores - higher)
            if mask is not None:
                p = jnp.where(mask, p, 0.0)
            shrink = jnp.exp(top - higher)
            out = out * shrink + _dot(p.astype(v_ref.dtype), v_ref[at, :], _NN)
            return out, higher, total * shrink + p.sum(1, keepdims=True)

        count, width = q.shape
        start = (
            jnp.zeros((count, width), jnp.float32),
            jnp.full((count, 1), MASKED, jnp.float32),
            jnp.zeros((count, 1), jnp.float32),
        )
        stop = form.key_blocks(i, k_ref.shape[0] // form.keys)
        out, top, total = jax.lax.fori_loop(0, stop, body, start)
        total = jnp.maximum(total, 1e-30)
        out_ref[...] = (out / total).astype(out_ref.dtype)
        total_ref[...] = _row(form, top + jnp.log(total))

    b, h, t, d = q.shape
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, 1, t), jnp.float32)]
    return _call(
        form,
        kernel,
        "forward",
        blocks=t // form.queries,
        operands=[(q, form.queries), (k, None), (v, None), (ids, None)],
        out_shapes=shapes,
        out_blocks=[(form.queries, d), (1, form.queries)],
    )


def _query_gradient(
    form: Form, q: Array, k: Array, v: Array, ids: Array | None, gradient: Array, total: Array, delta: Array
) -> Float[Array, "B H T D"]:
    def kernel(
        i: jax.Array,
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        ids_ref: Any,
        do_ref: Any,
        total_ref: Any,
        delta_ref: Any,
        dq_ref: Any,
    ) -> None:
        q, do = q_ref[...], do_ref[...]
        total, delta = _column(form, total_ref[...]), _column(form, delta_ref[...])
        own = None if ids_ref is None else _column(form, ids_ref[:, _part(i, form.queries)])

        def body(j: jax.Array, dq: jax.Array) -> jax.Array:
            at = _part(j, form.keys)
            k = k_ref[at, :]
            p = jnp.exp(_dot(q, k, _NT) * form.scale - total)
            mask = _mask(form, own, None if ids_ref is None else ids_ref[:, at], i, j, keys_axis=1)
            if mask is not None:
                p = jnp.where(mask, p, 0.0)
            ds = p * (_dot(do, v_ref[at, :], _NT) - delta)
            return dq + _dot(ds.astype(k.dtype), k, _NN)

        stop = form.key_blocks(i, k_ref.shape[0] // form.keys)
        dq = jax.lax.fori_loop(0, stop, body, jnp.zeros(q.shape, jnp.float32))
        dq_ref[...] = (dq * form.scale).astype(dq_ref.dtype)

    n = form.queries
    operands = [(q, n), (k, None), (v, None), (ids, None), (gradient, n), (total, n), (delta, n)]
    return _call(
        form,
        kernel,
        "query_gradient",
        blocks=q.shape[2] // n,
        operands=operands,
        out_shapes=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        out_blocks=[(n, q.shape[-1])],
    )[0]


def _key_gradient(
    form: Form, q: Array, k: Array, v: Array, ids: Array | None, gradient: Array, total: Array, delta: Array
) -> tuple[Float[Array, "B H S D"], Float[Array, "B H S D"]]:
    def kernel(
        j: jax.Array,
        q_ref: Any,
        k_ref: Any,
        v_ref: Any,
        ids_ref: Any,
        do_ref: Any,
        total_ref: Any,
        delta_ref: Any,
        dk_ref: Any,
        dv_ref: Any,
    ) -> None:
        k, v = k_ref[...], v_ref[...]
        own = None if ids_ref is None else _column(form, ids_ref[:, _part(j, form.keys)])

        def body(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dk, dv = carry
            at = _part(i, form.queries)
            q, do = q_ref[at, :], do_ref[at, :]
            p = jnp.exp(_dot(k, q, _NT) * form.scale - total_ref[:, at])  # [keys, queries]
            mask = _mask(form, None if ids_ref is None else ids_ref[:, at], own, i, j, keys_axis=0)
            if mask is not None:
                p = jnp.where(mask, p, 0.0)
            dv = dv + _dot(p.astype(do.dtype), do, _NN)
            ds = p * (_dot(v, do, _NT) - delta_ref[:, at])
            return dk + _dot(ds.astype(q.dtype), q, _NN), dv

        zeros = jnp.zeros(k.shape, jnp.float32)
        dk, dv = jax.lax.fori_loop(form.first_query_block(j), q_ref.shape[0] // form.queries, body, (zeros, zeros))
        dk_ref[...] = (dk * form.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv.astype(dv_ref.dtype)

    n, d = form.keys, k.shape[-1]
    operands = [(q, None), (k, n), (v, n), (ids, None), (gradient, None), (total, None), (delta, None)]
    return _call(
        form,
        kernel,
        "key_gradient",
        blocks=k.shape[2] // n,
        operands=operands,
        out_shapes=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        out_blocks=[(n, d), (n, d)],
    )


def _mask(
    form: Form, queries: Array | None, keys: Array | None, i: jax.Array, j: jax.Array, keys_axis: int
) -> Array | None:
    """Who sees whom in the block of queries i and keys j; None: everybody everybody."""
    shape = (form.queries, form.keys) if keys_axis else (form.keys, form.queries)
    key = j * form.keys + jax.lax.broadcasted_iota(jnp.int32, shape, keys_axis)
    if form.visible is None or queries is None or keys is None:
        return None if form.length % form.keys == 0 else key < form.length
    query = i * form.queries + jax.lax.broadcasted_iota(jnp.int32, shape, 1 - keys_axis)
    return (query >= key) & form.visible(queries, keys)


def _dot(a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, dimensions, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def _part(i: jax.Array, size: int) -> Any:
    return pl.ds(pl.multiple_of(i * size, size), size)


def _column(form: Form, row: Array) -> Array:
    """[1, n] -> [n, 1]."""
    return row.T if form.platform == "tpu" else row.reshape(-1, 1)


def _row(form: Form, column: Array) -> Array:
    """[n, 1] -> [1, n]."""
    return column.T if form.platform == "tpu" else column.reshape(1, -1)


def _call(
    form: Form,
    kernel: Callable,
    name: str,
    *,
    blocks: int,
    operands: list[tuple[Array | None, int | None]],
    out_shapes: list[jax.ShapeDtypeStruct],
    out_blocks: list[tuple[int, int]],
) -> Any:
    """Runs `kernel(block number, references...)` for every batch, head and block.

    Operands [B, H, T, D], [B, H, 1, T] or [B, 1, T] (ids) come with the tokens of a block, or None for all of them.
    """
    batch, heads = out_shapes[0].shape[:2]
    inner = form.platform == "gpu"  # the axis that runs fastest: the first on GPU, the last on TPU
    grid = (blocks, batch, heads) if inner else (batch, heads, blocks)

    def spec(shape: tuple[int, ...], block: tuple[int, ...], moving: int | None) -> pl.BlockSpec:
        lead = (None,) * (len(shape) - 2)

        def index(*place: Any) -> tuple[Any, ...]:
            i, b, h = place if inner else (place[2], place[0], place[1])
            where = [b, h][: len(lead)]
            return (*where, *(i if axis == moving else 0 for axis in range(2)))

        return pl.BlockSpec((*lead, *block), index)

    specs = []
    for operand, tokens in operands:
        if operand is None:
            continue
        axis = 1 if operand.shape[-2] == 1 else 0  # rows of one number a token lie along the last axis
        block = list(operand.shape[-2:])
        if tokens is not None:
            block[axis] = tokens
        specs.append(spec(operand.shape, tuple(block), None if tokens is None else axis))
    out_specs = [spec(s.shape, b, 1 if s.shape[-2] == 1 else 0) for s, b in zip(out_shapes, out_blocks, strict=True)]
    present = [operand is not None for operand, _ in operands]

    def body(*references: Any) -> None:
        rest = iter(references)
        given = [next(rest) if there else None for there in present]
        kernel(pl.program_id(0 if inner else 2), *given, *rest)

    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shapes,
        name=f"branch_attention_{name}",
        **_platform_options(form.platform, out_shapes[0].dtype.itemsize),
    )(*(operand for operand, _ in operands if operand is not None))


def _platform_options(platform: str, bytes_each: int) -> dict[str, Any]:
    match platform:
        case "tpu":
            from jax.experimental.pallas import tpu

            return {"compiler_params": tpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))}
        case "gpu":
            from jax.experimental.pallas import triton

            return {"compiler_params": triton.CompilerParams(num_warps=8 if bytes_each == 2 else 4, num_stages=2)}
        case _:
            return {"interpret": True}
