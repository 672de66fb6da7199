"""Log-probabilities of labelled tokens without ever holding [batch, length, vocabulary]."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from silkie_jax.nn.precision import precision

CHUNK = 128  # labelled positions of a row that meet the vocabulary at once


class TokenScores(NamedTuple):
    """Of each label, in float32: log p(label | what its predecessor has seen), and 1 where no token is likelier.

    Gradients flow through the log-probabilities alone.
    """

    logps: Float[Array, "B N"]
    greedy: Float[Array, "B N"]


def token_logprobs(
    hidden: Float[Array, "B T W"],
    predecessors: Int[Array, "B N"],
    labels: Int[Array, "B N"],
    head: Float[Array, "V W"],
    *,
    frozen_head: bool = False,
    chunk: int = CHUNK,
) -> Float[Array, "B N"]:
    """The log-probabilities of `token_scores`."""
    return token_scores(hidden, predecessors, labels, head, frozen_head=frozen_head, chunk=chunk).logps


def token_scores(
    hidden: Float[Array, "B T W"],
    predecessors: Int[Array, "B N"],
    labels: Int[Array, "B N"],
    head: Float[Array, "V W"],
    *,
    frozen_head: bool = False,
    chunk: int = CHUNK,
) -> TokenScores:
    """Log-probability of each label, and whether greedy decoding would have said it.

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
        again = jax.checkpoint(_of_labels)
        out = jax.lax.map(lambda x: again(x[0], x[1], head), (rows, by_chunk(labels)))
    return TokenScores(*(x.swapaxes(0, 1).reshape(batch, -1)[:, :count] for x in out))


def _of_labels(rows: Float[Array, "B c W"], labels: Int[Array, "B c"], head: Float[Array, "V W"]) -> TokenScores:
    return _chunk(rows, labels, head)[0]


def _chunk(
    rows: Float[Array, "B c W"], labels: Int[Array, "B c"], head: Float[Array, "V W"]
) -> tuple[TokenScores, Float[Array, "B c V"], Float[Array, "B c"]]:
    """(the labels' scores, all scores, log-sum-exp) of one chunk, in float32."""
    scores = jnp.einsum(
        "bcw,vw->bcv",
        rows,
        head.astype(rows.dtype),
        precision=precision(rows.dtype),
        preferred_element_type=jnp.float32,
    )
    total = jax.nn.logsumexp(scores, axis=-1)
    own = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
    # The log-sum-exp has found the maximum already: to compare with it costs nothing, an argmax would.
    greedy = jax.lax.stop_gradient(own) >= jax.lax.stop_gradient(scores).max(axis=-1)
    return TokenScores(own - total, greedy.astype(jnp.float32)), scores, total


@jax.custom_vjp
def _frozen_head(rows: Float[Array, "C B c W"], labels: Int[Array, "C B c"], head: Float[Array, "V W"]) -> TokenScores:
    return jax.lax.map(lambda x: _of_labels(x[0], x[1], head), (rows, labels))


def _frozen_head_forward(rows: Array, labels: Array, head: Array) -> tuple[TokenScores, Array]:
    def one(x: tuple[Array, Array]) -> tuple[TokenScores, Array]:
        hidden, label = x
        found, scores, total = _chunk(hidden, label, head)
        weights = head.astype(hidden.dtype)
        probabilities = jnp.exp(scores - total[..., None]).astype(hidden.dtype)
        expected = jnp.einsum(
            "bcv,vw->bcw",
            probabilities,
            weights,
            precision=precision(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        return found, (weights[label] - expected).astype(hidden.dtype)

    return jax.lax.map(one, (rows, labels))


def _frozen_head_backward(directions: Array, cotangent: TokenScores) -> tuple[Array, None, None]:
    return cotangent.logps[..., None].astype(directions.dtype) * directions, None, None


_frozen_head.defvjp(_frozen_head_forward, _frozen_head_backward)


def branch_sums(values: Float[Array, "B N"], label_branches: Int[Array, "B N"], branches: int) -> Float[Array, "B K"]:
    """Adds the values of each branch's labels; branch 0 marks padding and counts nowhere."""
    member = label_branches[..., None] == jnp.arange(1, branches + 1)  # [B, N, K]
    return jnp.where(member, values[..., None], 0).sum(1)
