"""Log-probabilities of labelled tokens without ever holding [batch, length, vocabulary]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from silkie_jax.nn.precision import precision

CHUNK = 128  # labelled positions of a row that meet the vocabulary at once


def token_logprobs(
    hidden: Float[Array, "B T W"],
    predecessors: Int[Array, "B N"],
    labels: Int[Array, "B N"],
    head: Float[Array, "V W"],
    *,
    frozen_head: bool = False,
    chunk: int = CHUNK,
) -> Float[Array, "B N"]:
    """log p(label | what its predecessor has seen), in float32.

    `predecessors[b, n]` is the index in row b of the token whose hidden state predicts `labels[b, n]`. Only those
    positions meet the vocabulary matrix, `chunk` of each row at a time, so that memory grows with `chunk` x V and not
    with N x V.

    A head that is trained has each chunk's scores computed again in the backward pass. With `frozen_head` no gradient
    flows to `head`, and the gradient of each log-probability with respect to its hidden state, W[label] - p W, is made
    in the forward pass, while the scores are there: two matmuls with the vocabulary instead of three.
    """
    batch, count = labels.shape
    chunk = min(chunk, count)
    chunks = -(-count // chunk)
    pad = ((0, 0), (0, chunks * chunk - count))

    def by_chunk(x: Int[Array, "B N"]) -> Int[Array, "C B c"]:
        return jnp.pad(x, pad).reshape(batch, chunks, chunk).swapaxes(0, 1)

    picked = by_chunk(predecessors)
    rows = jnp.take_along_axis(hidden, picked.swapaxes(0, 1).reshape(batch, -1)[..., None], axis=1)
    rows = rows.reshape(batch, chunks, chunk, -1).swapaxes(0, 1)  # [C, B, c, W]
    if frozen_head:
        out = _frozen_head(rows, by_chunk(labels), head)
    else:
        again = jax.checkpoint(_logprobs)
        out = jax.lax.map(lambda x: again(x[0], x[1], head)[0], (rows, by_chunk(labels)))
    return out.swapaxes(0, 1).reshape(batch, -1)[:, :count]


def _logprobs(
    rows: Float[Array, "B c W"], labels: Int[Array, "B c"], head: Float[Array, "V W"]
) -> tuple[Float[Array, "B c"], Float[Array, "B c V"], Float[Array, "B c"]]:
    """(log-probabilities, scores, log-sum-exp) of one chunk, in float32."""
    scores = jnp.einsum(
        "bcw,vw->bcv",
        rows,
        head.astype(rows.dtype),
        precision=precision(rows.dtype),
        preferred_element_type=jnp.float32,
    )
    total = jax.nn.logsumexp(scores, axis=-1)
    return jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0] - total, scores, total


@jax.custom_vjp
def _frozen_head(
    rows: Float[Array, "C B c W"], labels: Int[Array, "C B c"], head: Float[Array, "V W"]
) -> Float[Array, "C B c"]:
    return jax.lax.map(lambda x: _logprobs(x[0], x[1], head)[0], (rows, labels))


def _frozen_head_forward(rows: Array, labels: Array, head: Array) -> tuple[Array, Array]:
    def one(x: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, label = x
        logps, scores, total = _logprobs(hidden, label, head)
        weights = head.astype(hidden.dtype)
        probabilities = jnp.exp(scores - total[..., None]).astype(hidden.dtype)
        expected = jnp.einsum(
            "bcv,vw->bcw",
            probabilities,
            weights,
            precision=precision(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        return logps, (weights[label] - expected).astype(hidden.dtype)

    logps, directions = jax.lax.map(one, (rows, labels))
    return logps, directions


def _frozen_head_backward(directions: Array, cotangent: Array) -> tuple[Array, None, None]:
    return cotangent[..., None].astype(directions.dtype) * directions, None, None


_frozen_head.defvjp(_frozen_head_forward, _frozen_head_backward)


def branch_sums(values: Float[Array, "B N"], label_branches: Int[Array, "B N"], branches: int) -> Float[Array, "B K"]:
    """Adds the values of each branch's labels; branch 0 marks padding and counts nowhere."""
    member = label_branches[..., None] == jnp.arange(1, branches + 1)  # [B, N, K]
    return jnp.where(member, values[..., None], 0).sum(1)
