"""Log-probabilities of labelled tokens without ever holding [batch, length, vocabulary]."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from silkie_jax.nn.precision import precision

CHUNK = 128  # labelled positions of a row that meet the vocabulary at once


Through = Literal["all", "base", "nothing"]


def extrapolate(
    a: Float[Array, "..."], b: Float[Array, "..."], factor: float, through: Through = "all"
) -> Float[Array, "..."]:
    """a + factor x (a - b), of log-probabilities or of scores: beyond one model, away from another.

    V-DPO's guidance (b: without the image) and SPA's de-coupled margin (b: the reference) are this line. No gradient
    flows to b. `through` says which flows to a: `all` of it, 1 + factor; that of the `base` alone, 1; or `nothing`.
    """
    beyond = factor * (a - jax.lax.stop_gradient(b))
    match through:
        case "all":
            return a + beyond
        case "base":
            return a + jax.lax.stop_gradient(beyond)
    return jax.lax.stop_gradient(a + beyond)


class TokenScores(NamedTuple):
    """Of each label, in float32: log p(label | what its predecessor has seen), and 1 where no token is likelier.

    Gradients flow through the log-probabilities alone.
    """

    logps: Float[Array, "B N"]
    greedy: Float[Array, "B N"]


class MixedScores(NamedTuple):
    """The same, with log p(label) by another model, `against`, and by the extrapolated scores of both, `mixed`.

    Gradients flow through `logps` and `mixed` to the first model's hidden states.
    """

    logps: Float[Array, "B N"]
    greedy: Float[Array, "B N"]
    against: Float[Array, "B N"]
    mixed: Float[Array, "B N"]


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
    chunks = _Chunks(predecessors, labels, chunk)
    if frozen_head:
        out = _frozen_head(chunks.rows(hidden), chunks.labels, head)
    else:
        again = jax.checkpoint(_of_labels)
        out = jax.lax.map(lambda x: again(x[0], x[1], head), (chunks.rows(hidden), chunks.labels))
    return TokenScores(*map(chunks.join, out))


def mixed_scores(
    hidden: Float[Array, "B T W"],
    against: Float[Array, "B T W"],
    predecessors: Int[Array, "B N"],
    labels: Int[Array, "B N"],
    head: Float[Array, "V W"],
    against_head: Float[Array, "V W"],
    factor: float,
    through: Through,
    *,
    frozen_head: bool = False,
    chunk: int = CHUNK,
) -> MixedScores:
    """`token_scores` of two models from their hidden states of the same rows, and of both models' scores extrapolated.

    Extrapolated are a chunk's scores before the softmax, in float32: `extrapolate(own, other, factor, through)`. Both
    are there for the log-probabilities of the two models, so that the third costs no product with the vocabulary. (Of
    hidden states in bfloat16 the same line would be off by a hundredth of a nat a token.)
    """
    chunks = _Chunks(predecessors, labels, chunk)
    arrays = chunks.rows(hidden), chunks.rows(jax.lax.stop_gradient(against)), chunks.labels
    against_head = jax.lax.stop_gradient(against_head)
    if frozen_head:
        out = _frozen_mixed(factor, through, *arrays, head, against_head)
    else:
        again = jax.checkpoint(partial(_mixed_labels, factor, through))
        out = jax.lax.map(lambda x: again(*x, head, against_head), arrays)
    return MixedScores(*map(chunks.join, out))


class _Chunks:
    """Labels and the hidden states that predict them, cut into C chunks of c labels a row."""

    def __init__(self, predecessors: Int[Array, "B N"], labels: Int[Array, "B N"], chunk: int):
        self.batch, self.count = labels.shape
        self.chunk = min(chunk, self.count)
        self.chunks = -(-self.count // self.chunk)
        self.labels, self._picked = self._cut(labels), self._cut(predecessors)

    def _cut(self, x: Int[Array, "B N"]) -> Int[Array, "C B c"]:
        padded = jnp.pad(x, ((0, 0), (0, self.chunks * self.chunk - self.count)))
        return padded.reshape(self.batch, self.chunks, self.chunk).swapaxes(0, 1)

    def rows(self, hidden: Float[Array, "B T W"]) -> Float[Array, "C B c W"]:
        picked = self._picked.swapaxes(0, 1).reshape(self.batch, -1)[..., None]
        rows = jnp.take_along_axis(hidden, picked, axis=1)
        return rows.reshape(self.batch, self.chunks, self.chunk, -1).swapaxes(0, 1)

    def join(self, x: Float[Array, "C B c"]) -> Float[Array, "B N"]:
        return x.swapaxes(0, 1).reshape(self.batch, -1)[:, : self.count]


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
        return found, _direction(scores, total, label, head, hidden.dtype)

    return jax.lax.map(one, (rows, labels))


def _direction(scores: Array, total: Array, labels: Array, head: Array, dtype: jnp.dtype) -> Float[Array, "B c W"]:
    """The gradient of each log-probability by its hidden state, W[label] - p W."""
    weights = head.astype(dtype)
    probabilities = jnp.exp(scores - total[..., None]).astype(dtype)
    expected = jnp.einsum(
        "bcv,vw->bcw", probabilities, weights, precision=precision(dtype), preferred_element_type=jnp.float32
    )
    return (weights[labels] - expected).astype(dtype)


def _frozen_head_backward(directions: Array, cotangent: TokenScores) -> tuple[Array, None, None]:
    return cotangent.logps[..., None].astype(directions.dtype) * directions, None, None


_frozen_head.defvjp(_frozen_head_forward, _frozen_head_backward)


def _mixed_labels(
    factor: float, through: Through, rows: Array, others: Array, labels: Array, head: Array, other_head: Array
) -> MixedScores:
    return _mixed_chunk(factor, through, rows, others, labels, head, other_head)[0]


def _mixed_chunk(
    factor: float, through: Through, rows: Array, others: Array, labels: Array, head: Array, other_head: Array
) -> tuple[MixedScores, list[tuple[Float[Array, "B c V"], Float[Array, "B c"]]]]:
    """The labels' scores, and of the first model and of the mixture: all scores and their log-sum-exp."""
    own, scores, total = _chunk(rows, labels, head)
    other, other_scores, _ = _chunk(others, labels, other_head)
    mixed = extrapolate(scores, other_scores, factor, through)
    mixed_total = jax.nn.logsumexp(mixed, axis=-1)
    label = jnp.take_along_axis(mixed, labels[..., None], axis=-1)[..., 0]
    found = MixedScores(own.logps, own.greedy, jax.lax.stop_gradient(other.logps), label - mixed_total)
    return found, [(scores, total), (mixed, mixed_total)]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _frozen_mixed(
    factor: float, through: Through, rows: Array, others: Array, labels: Array, head: Array, other_head: Array
) -> MixedScores:
    return jax.lax.map(
        lambda x: _mixed_labels(factor, through, x[0], x[1], x[2], head, other_head), (rows, others, labels)
    )


def _frozen_mixed_forward(
    factor: float, through: Through, rows: Array, others: Array, labels: Array, head: Array, other_head: Array
) -> tuple[MixedScores, tuple[Array, Array | None]]:
    slope = {"all": 1 + factor, "base": 1.0, "nothing": 0.0}[through]  # of `extrapolate` by its first argument

    def one(x: tuple[Array, Array, Array]) -> tuple[MixedScores, tuple[Array, Array | None]]:
        found, (own, mixed) = _mixed_chunk(factor, through, *x, head, other_head)
        towards: Callable = partial(_direction, labels=x[2], head=head, dtype=x[0].dtype)
        return found, (towards(*own), slope * towards(*mixed) if slope else None)

    return jax.lax.map(one, (rows, others, labels))


def _frozen_mixed_backward(
    factor: float, through: Through, directions: tuple[Array, Array | None], cotangent: MixedScores
) -> tuple[Array, None, None, None, None]:
    own, mixed = directions
    rows = cotangent.logps[..., None].astype(own.dtype) * own
    if mixed is not None:
        rows = rows + cotangent.mixed[..., None].astype(mixed.dtype) * mixed
    return rows, None, None, None, None


_frozen_mixed.defvjp(_frozen_mixed_forward, _frozen_mixed_backward)


def branch_sums(values: Float[Array, "B N"], label_branches: Int[Array, "B N"], branches: int) -> Float[Array, "B K"]:
    """Adds the values of each branch's labels; branch 0 marks padding and counts nowhere."""
    member = label_branches[..., None] == jnp.arange(1, branches + 1)  # [B, N, K]
    return jnp.where(member, values[..., None], 0).sum(1)
