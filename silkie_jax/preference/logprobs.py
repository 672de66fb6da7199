"""Log-probabilities of labelled tokens without ever holding [batch, length, vocabulary]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 128  # labelled positions of a row that meet the vocabulary at once


def token_logprobs(
    hidden: Float[Array, "B T W"],
    predecessors: Int[Array, "B N"],
    labels: Int[Array, "B N"],
    logits: Callable[[Float[Array, "... W"]], Float[Array, "... V"]],
    chunk: int = CHUNK,
) -> Float[Array, "B N"]:
    """log p(label | what its predecessor has seen), in float32.

    `predecessors[b, n]` is the index in row b of the token whose hidden state predicts `labels[b, n]`. Only those
    positions meet the vocabulary, `chunk` of each row at a time; the backward pass computes each chunk's scores again
    instead of keeping them, so that memory grows with `chunk` x V and not with N x V.
    """
    batch, count = labels.shape
    chunk = min(chunk, count)
    chunks = -(-count // chunk)
    pad = ((0, 0), (0, chunks * chunk - count))

    def by_chunk(x: Int[Array, "B N"]) -> Int[Array, "C B c"]:
        return jnp.pad(x, pad).reshape(batch, chunks, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def one(at: Int[Array, "B c"], label: Int[Array, "B c"]) -> Float[Array, "B c"]:
        scores = logits(jnp.take_along_axis(hidden, at[..., None], axis=1))
        picked = jnp.take_along_axis(scores, label[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(scores, axis=-1)

    out = jax.lax.map(lambda x: one(*x), (by_chunk(predecessors), by_chunk(labels)))
    return out.swapaxes(0, 1).reshape(batch, -1)[:, :count]


def branch_sums(values: Float[Array, "B N"], label_branches: Int[Array, "B N"], branches: int) -> Float[Array, "B K"]:
    """Adds the values of each branch's labels; branch 0 marks padding and counts nowhere."""
    member = label_branches[..., None] == jnp.arange(1, branches + 1)  # [B, N, K]
    return jnp.where(member, values[..., None], 0).sum(1)
