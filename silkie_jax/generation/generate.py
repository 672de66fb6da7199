"""Batched generation with a cache of keys and values: greedy or nucleus sampling (arXiv 1904.09751)."""

from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, UInt8

from silkie_jax.errors import UserError
from silkie_jax.generation.requests import check_sampling, stop_sequences
from silkie_jax.generation.sampling import sample
from silkie_jax.models.qwen_vl.language import Cache, frequencies, ntk_alpha, rotation
from silkie_jax.models.qwen_vl.model import QwenVL, check_inputs, check_spans
from silkie_jax.nn.attention import PADDING, PROMPT, branch_mask

StopSequences = tuple[tuple[int, ...], ...]


def generate(
    model: QwenVL,
    tokens: Int[ArrayLike, "B T"],
    images: UInt8[ArrayLike, "N S S 3"] | None,
    max_new_tokens: int,
    mask: Bool[ArrayLike, "B T"] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Iterable[int | Sequence[int]] = (),
    seed: int = 0,
) -> Int[Array, "B M"]:
    """Continues each prompt by at most `max_new_tokens` ids.

    A row ends at the end-of-text id or when its last ids equal an entry of `stop` (an id, or a sequence of ids); what
    ended it is kept and end-of-text follows to the full width. `mask` is True at tokens (None: everywhere); padding
    may stand on either side. `temperature` 0 is greedy; otherwise ids are drawn, from `seed`, among the most probable
    whose probabilities add up to `top_p`.

    As in the official code the dynamic NTK factor is that of the (padded) prompt and stays so while decoding, and
    positions count from the left edge of the left-padded batch.

    Raises:
      UserError: options out of range, an empty prompt, or images that do not fit the tokens.
    """
    check_sampling(max_new_tokens, temperature, top_p, seed)
    checked, images, mask = check_inputs(model.config, tokens, images, mask)
    valid = np.ones(checked.shape, bool) if mask is None else np.asarray(mask)
    if not valid.any(1).all():
        raise UserError("a prompt is empty: its mask has no token")
    ids, valid = _pad_left(np.asarray(checked), valid)
    check_spans(model.config, ids, 0 if images is None else len(images))  # a mask with holes may have cut one
    graph, state = nnx.split(model)
    return _generate(
        graph,
        state,
        ids,
        images,
        valid,
        jnp.maximum(jnp.float32(temperature), jnp.finfo(jnp.float32).tiny),
        jnp.float32(top_p),
        jax.random.key(seed),
        max_new_tokens=int(max_new_tokens),
        stops=stop_sequences(stop),
        greedy=temperature == 0,
    )


def _pad_left(ids: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moves all padding to the left, so that every prompt ends where decoding begins."""
    order = np.argsort(valid, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(valid, order, 1)


@partial(jax.jit, static_argnames=("graph", "max_new_tokens", "stops", "greedy"))
def _generate(
    graph,
    state,
    tokens,
    images,
    valid,
    temperature,
    top_p,
    key,
    *,
    max_new_tokens: int,
    stops: StopSequences,
    greedy: bool,
) -> Int[Array, "B M"]:
    model: QwenVL = nnx.merge(graph, state)
    config = model.config
    batch, prompt = tokens.shape
    size = prompt + max_new_tokens
    turns = frequencies(config, ntk_alpha(config, prompt))  # kept for all later steps
    # Which slots of the cache may be seen: the prompt's tokens, then everything generated so far.
    seen = jnp.concatenate([valid, jnp.ones((batch, max_new_tokens), bool)], axis=1)

    def forward(x: jax.Array, positions: jax.Array, mask: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        hidden, cache = model.language.cached(x, rotation(config, positions, turns, train=False), mask, cache)
        return model.language.logits(hidden[:, -1]), cache

    def choose(logits: jax.Array, step: jax.Array) -> jax.Array:
        if greedy:
            return logits.argmax(-1)
        return sample(logits, temperature, top_p, jax.random.fold_in(key, step))

    def emit(out: jax.Array, done: jax.Array, token: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = out.at[:, step].set(jnp.where(done, config.end_of_text, token))
        return out, done | (token == config.end_of_text) | ends_with(out, step, stops)

    def more(carry) -> jax.Array:
        _, done, step, _ = carry
        return (step < max_new_tokens) & ~done.all()

    def decode(carry):
        out, done, step, cache = carry
        x = model.embed(out[:, step - 1][:, None], None)
        positions = jnp.full((batch, 1), prompt + step - 1)
        mask = seen & (jnp.arange(size) < prompt + step)
        logits, cache = forward(x, positions, mask[:, None], cache)
        out, done = emit(out, done, choose(logits, step), step)
        return out, done, step + 1, cache

    features = None if images is None else model.encode_images(images)
    positions = jnp.broadcast_to(jnp.arange(prompt), (batch, prompt))
    mask = jnp.pad(branch_mask(jnp.where(valid, PROMPT, PADDING)), ((0, 0), (0, 0), (0, max_new_tokens)))
    x = model.embed(tokens, features)
    logits, cache = forward(x, positions, mask, Cache.empty(config, batch, size, model.dtype))

    first = jnp.int32(0)
    out = jnp.full((batch, max_new_tokens), config.end_of_text, jnp.int32)
    out, done = emit(out, jnp.zeros(batch, bool), choose(logits, first), first)
    return jax.lax.while_loop(more, decode, (out, done, first + 1, cache))[0]


def ends_with(out: Int[Array, "B M"], step: Int[Array, ""], stops: StopSequences) -> Bool[Array, "B"]:
    """Whether the ids up to and including `step` end with one of `stops`."""
    found = jnp.zeros(out.shape[0], bool)
    for sequence in stops:
        n = len(sequence)
        if n <= out.shape[1]:
            tail = jax.lax.dynamic_slice_in_dim(out, jnp.maximum(step + 1 - n, 0), n, axis=1)
            found |= (step + 1 >= n) & (tail == jnp.asarray(sequence)).all(1)
    return found
