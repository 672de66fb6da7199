"""Fused log-probabilities against plain ones, in value, gradient and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from silkie_jax.preference.logprobs import branch_sums, extrapolate, mixed_scores, token_logprobs, token_scores

B, T, W, V = 3, 50, 8, 101


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, T, W)), jnp.float32)
    weight = jnp.asarray(3 * rng.standard_normal((V, W)), jnp.float32)
    predecessors = rng.integers(0, T, (B, 37))
    labels = rng.integers(0, V, (B, 37))
    return hidden, weight, predecessors, labels


def plain(hidden, weight, predecessors, labels):
    logps = jax.nn.log_softmax(hidden @ weight.T, axis=-1)
    return logps[np.arange(B)[:, None], predecessors, labels]


def fused(hidden, weight, predecessors, labels, **chunk):
    return token_logprobs(hidden, predecessors, labels, weight, **chunk)


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 64, 128])
def test_equal_to_the_plain_ones_for_every_chunk(inputs, chunk):
    np.testing.assert_allclose(fused(*inputs, chunk=chunk), plain(*inputs), rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_the_plain_ones(inputs):
    weights = np.random.default_rng(1).standard_normal((B, 37))

    def gradients(f, **chunk):
        return jax.grad(lambda h, w: (f(h, w, *inputs[2:], **chunk) * weights).sum(), argnums=(0, 1))(*inputs[:2])

    for ours, expected in zip(gradients(fused, chunk=10), gradients(plain), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gives_the_same_gradient_to_its_input(inputs):
    hidden, weight, *rest = inputs
    factors = np.random.default_rng(1).standard_normal((B, 37))

    def loss(h, f, **options):
        return (f(h, weight, *rest, **options) * factors).sum()

    ours, theirs = jax.grad(loss)(hidden, fused, frozen_head=True, chunk=10), jax.grad(loss)(hidden, plain)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen_head", [False, True])
def test_greedy_counts_labels_that_have_the_highest_score(inputs, frozen_head):
    hidden, weight, predecessors, labels = inputs
    best = np.argmax(np.asarray(hidden) @ np.asarray(weight).T, -1)[np.arange(B)[:, None], predecessors]
    labels = np.where(np.random.default_rng(2).random(labels.shape) < 0.4, best, labels)

    def scores(h):
        found = token_scores(h, predecessors, labels, weight, frozen_head=frozen_head, chunk=10)
        return found.logps.sum(), found

    (_, found), slope = jax.value_and_grad(scores, has_aux=True)(hidden)
    np.testing.assert_array_equal(found.greedy, labels == best)
    assert 0.3 < found.greedy.mean() < 0.6
    expected = jax.grad(lambda h: plain(h, weight, predecessors, labels).sum())(hidden)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=5e-5)


def test_large_scores_do_not_overflow(inputs):
    hidden, weight, *rest = inputs
    ours = fused(hidden * 1e3, weight, *rest)
    assert np.isfinite(ours).all()
    assert (ours <= 0).all()


@pytest.mark.parametrize("frozen_head", [False, True])
def test_memory_does_not_grow_with_labels_times_vocabulary(frozen_head):
    """Twice the labels must not mean twice the scores at any time, forward and backward."""
    vocabulary, width, chunk = 20_000, 8, 64

    def temporaries(labels):
        def loss(hidden, weight, predecessors, targets):
            logps = token_logprobs(hidden, predecessors, targets, weight, chunk=chunk, frozen_head=frozen_head)
            return logps.sum()

        shapes = ((1, labels, width), (vocabulary, width))
        arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        arguments += [jax.ShapeDtypeStruct((1, labels), jnp.int32)] * 2
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(128), temporaries(2048)
    assert few < 4 * chunk * vocabulary * 4  # a few copies of one chunk's scores
    assert many - few < chunk * vocabulary * 4  # all of them would be 30 chunks more


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("through", ["all", "base", "nothing"])
def test_extrapolated_scores_and_their_gradient(inputs, through, frozen_head):
    """Of both models, and of scores beyond the first one, away from the second, against whole logits."""
    hidden, weight, predecessors, labels = inputs
    other = jnp.asarray(np.random.default_rng(3).standard_normal(hidden.shape), jnp.float32)
    factors = np.random.default_rng(1).standard_normal((2, B, 37))
    at = np.arange(B)[:, None], predecessors, labels

    def fused_both(h):
        options = {"frozen_head": frozen_head, "chunk": 10}
        found = mixed_scores(h, other, predecessors, labels, weight, weight, 0.5, through, **options)
        return (factors[0] * found.logps + factors[1] * found.mixed).sum(), found

    def plain_both(h):
        mixed = extrapolate(h @ weight.T, other @ weight.T, 0.5, through)
        logps = [jax.nn.log_softmax(scores, axis=-1)[at] for scores in (h @ weight.T, mixed)]
        return (factors[0] * logps[0] + factors[1] * logps[1]).sum(), logps[1]

    (_, found), slope = jax.value_and_grad(fused_both, has_aux=True)(hidden)
    (_, mixed), expected = jax.value_and_grad(plain_both, has_aux=True)(hidden)
    np.testing.assert_allclose(found.mixed, mixed, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.against, plain(other, *inputs[1:]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.logps, plain(*inputs), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen_head", [False, True])
def test_extrapolated_scores_do_not_outlive_a_chunk(frozen_head):
    vocabulary, width, chunk = 20_000, 8, 64

    def temporaries(labels):
        def loss(hidden, other, weight, predecessors, targets):
            heads, options = (weight, weight), {"chunk": chunk, "frozen_head": frozen_head}
            found = mixed_scores(hidden, other, predecessors, targets, *heads, 0.5, "base", **options)
            return found.mixed.sum() + found.logps.sum()

        shapes = ((1, labels, width), (1, labels, width), (vocabulary, width))
        arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        arguments += [jax.ShapeDtypeStruct((1, labels), jnp.int32)] * 2
        return jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(128), temporaries(2048)
    assert few < 8 * chunk * vocabulary * 4  # a few copies of one chunk's scores of both models
    assert many - few < chunk * vocabulary * 4


def test_sums_are_of_each_branch_and_padding_counts_nowhere():
    values = jnp.asarray([[1.0, 2.0, 4.0, 8.0, jnp.nan], [1.0, 1.0, 1.0, 1.0, 1.0]])
    branches = jnp.asarray([[1, 2, 1, 3, 0], [0, 0, 0, 0, 4]])
    assert branch_sums(values, branches, 4).tolist() == [[5, 2, 8, 0], [0, 0, 0, 1]]
