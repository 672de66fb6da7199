"""The decoder's parts, the masks, and the decoder against the NumPy oracle."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from silkie_jax.models.qwen_vl.config import QWEN_VL_CHAT
from silkie_jax.models.qwen_vl.language import RMSNorm, frequencies, ntk_alpha, rotate, rotation
from silkie_jax.nn.attention import attention, branch_mask
from tests.reference import qwen_vl as reference
from tests.reference.golden import LANGUAGE_CASES
from tests.reference.objective import branch_row


def relative(ours, expected):
    return np.abs(np.asarray(ours, np.float64) - expected).max() / np.abs(expected).max()


# Positions


def test_ntk_alpha_is_the_official_one(reference_data, golden_model):
    cases = reference_data.json("facts")["cases"]
    for name in LANGUAGE_CASES:
        assert ntk_alpha(golden_model.config, cases[name]["shape"][1]) == cases[name]["ntk_alpha_eval"], name


@pytest.mark.parametrize(
    ("length", "alpha"), [(1, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7), (8193, 15)]
)
def test_ntk_alpha(length, alpha):
    assert ntk_alpha(QWEN_VL_CHAT, length) == alpha
    assert ntk_alpha(dataclasses.replace(QWEN_VL_CHAT, use_dynamic_ntk=False), length) == 1


@pytest.mark.parametrize("alpha", [1.0, 3.0, 7.0])
def test_rotary_embedding(alpha):
    config, positions = QWEN_VL_CHAT, np.array([[0, 1, 5, 300], [2, 2047, 2048, 6000]])
    x = np.random.default_rng(0).standard_normal((2, 4, 3, 128)).astype(np.float32)
    ours = rotate(x, rotation(config, positions, frequencies(config, alpha), train=False))
    base = config.rotary_emb_base * alpha ** (128 / 126)
    # Angles are float32, as officially: beyond 2048 radians a unit in the last place is 2.4e-4.
    np.testing.assert_allclose(ours, reference.rotate(x, positions, base), rtol=0, atol=2e-3)
    np.testing.assert_allclose(ours[:1], reference.rotate(x, positions, base)[:1], rtol=0, atol=2e-4)


def test_logn_scales_queries_beyond_seq_length_in_evaluation_only():
    positions = np.array([[0, 2046, 2047, 2048, 4095]])
    logn = rotation(QWEN_VL_CHAT, positions, frequencies(QWEN_VL_CHAT, 1.0), train=False).logn
    expected = [1, 1, 1, math.log(2049) / math.log(2048), 12 / 11]
    np.testing.assert_allclose(logn[0], expected, rtol=1e-6)
    assert rotation(QWEN_VL_CHAT, positions, frequencies(QWEN_VL_CHAT, 1.0), train=True).logn is None
    assert (
        rotation(
            dataclasses.replace(QWEN_VL_CHAT, use_logn_attn=False),
            positions,
            frequencies(QWEN_VL_CHAT, 1.0),
            train=False,
        ).logn
        is None
    )


# What stays float32 in a bfloat16 model


def test_rotary_embedding_of_bfloat16_turns_in_float32():
    """In bfloat16 position 2047 would be 2048, and the fast dimensions would turn to another place altogether."""
    positions = np.array([[2047, 1999, 1023]])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 2, 128)), jnp.bfloat16)
    r = rotation(QWEN_VL_CHAT, positions, frequencies(QWEN_VL_CHAT, 1.0), train=True)
    ours = rotate(x, r)
    assert (ours.dtype, r.cos.dtype) == (jnp.bfloat16, jnp.float32)
    exact = reference.rotate(np.asarray(x, np.float64), positions, 10000.0)
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2**-8, atol=2e-3)


def test_rms_norm_of_bfloat16_normalises_in_float32():
    norm = RMSNorm(4096, 1e-6, jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 4096)) * 1e-3, jnp.bfloat16)
    x64 = np.asarray(x, np.float64)
    exact = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6)  # epsilon as large as the mean square
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(norm(x), np.float64), exact, rtol=2**-8)


def test_softmax_of_bfloat16_is_float32():
    """2048 equal weights: a sum in bfloat16 stops growing at 256."""
    zeros, ones = jnp.zeros((1, 2048, 1, 8), jnp.bfloat16), jnp.ones((1, 2048, 1, 8), jnp.bfloat16)
    out = jax.jit(attention)(zeros, zeros, ones)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1, rtol=2**-7)


# Attention


def test_branch_mask_is_the_docstrings():
    x = True
    _ = False
    np.testing.assert_array_equal(
        branch_mask(jnp.array([[0, 0, 1, 1, 2, -1]]))[0],
        [
            [x, _, _, _, _, _],
            [x, x, _, _, _, _],
            [x, x, x, _, _, _],
            [x, x, x, x, _, _],
            [x, x, _, _, x, _],
            [_, _, _, _, _, _],
        ],
    )


def test_packed_rows_do_not_see_each_other():
    packed = branch_mask(jnp.array([[0, 0, 1, 2, 64, 65, 66, -1]]))[0]
    first, second = branch_mask(jnp.array([[0, 0, 1, 2]]))[0], branch_mask(jnp.array([[0, 1, 2]]))[0]
    np.testing.assert_array_equal(packed[:4, :4], first)
    np.testing.assert_array_equal(packed[4:7, 4:7], second)
    assert not packed[4:, :4].any()
    assert not packed[:, 7].any()


def test_branch_mask_of_padding_on_the_left_is_causal_behind_it():
    mask = branch_mask(jnp.array([[-1, -1, 0, 0], [0, 0, 0, 0]]))
    np.testing.assert_array_equal(mask[0, 2:], [[False, False, True, False], [False, False, True, True]])
    np.testing.assert_array_equal(mask[1], np.tri(4, dtype=bool))


def test_attention_equals_the_formula_and_is_finite_where_nothing_is_seen():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 3, 16)).astype(np.float32) for n in (4, 6, 6))
    mask = rng.random((2, 4, 6)) < 0.5
    mask[0, 1] = False
    mask[1, 2] = [0, 0, 0, 1, 0, 0]
    ours = np.asarray(jax.jit(attention)(q, k, v, mask))
    expected = reference.attend(*(a.astype(np.float64) for a in (q, k, v)), mask).reshape(ours.shape)
    assert np.isfinite(ours).all()
    sees = mask.any(-1)
    np.testing.assert_allclose(ours[sees], expected[sees], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(attention)(q, k, v).reshape(2, 4, -1), reference.attend(q, k, v), rtol=0, atol=1e-6
    )


def test_gradients_through_padding_are_finite():
    """A row's padding on the left sees nothing at all; its softmax must not turn gradients into NaN."""
    x = np.random.default_rng(0).standard_normal((1, 4, 1, 8)).astype(np.float32)
    mask = branch_mask(jnp.array([[-1, -1, 0, 0]]))
    gradient = jax.jit(jax.grad(lambda x: attention(x, x, x, mask)[:, 2:].sum()))(x)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[:, :2] == 0).all()


# The decoder against the oracle


@pytest.mark.parametrize(("length", "train"), [(20, False), (30, False), (60, False), (60, True)])
def test_text_with_padding_on_either_side_equals_the_oracle(short_pair, length, train):
    """seq_length is 24: 30 tokens have NTK factor 3, 60 have 7, and log-n attention begins inside them."""
    tokens = short_pair.text(3, length)
    mask = np.ones(tokens.shape, bool)
    mask[1, :7] = mask[2, -9:] = False
    ours = short_pair.model(tokens, mask=mask, train=train)
    expected = short_pair.oracle(tokens, mask=mask, train=train)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[mask], expected[mask], rtol=0, atol=2e-4)


def test_images_with_padding_on_either_side_equal_the_oracle(pair):
    """A row of two images, one of none, one of one: images come in order of appearance over the batch."""
    span = pair.image_span()
    text = pair.text(3, 600, seed=1).tolist()
    rows = [
        text[0][:9] + span + text[0][9:15] + span + text[0][15:20],
        text[1][:30],
        [*span, *text[2][:40]],  # an image as the very first thing
    ]
    length = max(map(len, rows)) + 3
    tokens, mask = np.full((3, length), pair.model.config.end_of_text), np.zeros((3, length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if i == 2 else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, True
    images = pair.pixels(3)
    ours, expected = pair.model(tokens, images, mask), pair.oracle(tokens, images, mask)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[mask], expected[mask], rtol=0, atol=2e-4)
    swapped = pair.model(tokens, images[[1, 0, 2]], mask)
    assert np.abs(swapped[0] - ours[0])[mask[0]].max() > 0.01
    np.testing.assert_array_equal(swapped[2], ours[2])


# Rows of branches


@nnx.jit
def hidden_of_rows(model, tokens, positions, branches, features):
    return model.hidden(tokens, positions, branches, features, train=True)


@pytest.fixture(scope="module")
def rows(pair):
    """Rows of K = 1..4 ragged branches, with and without an image: their arrays, and (row, prompt, responses)."""
    rng = np.random.default_rng(3)

    def words(n):
        return rng.integers(0, pair.model.config.end_of_text, n).tolist()

    span = pair.image_span()
    prompts = [words(5) + span + words(7), words(12), words(3) + span + words(2), words(40)]
    responses = [
        [words(9)],
        [words(n) for n in (1, 30)],
        [words(n) for n in (12, 3, 8)],
        [words(n) for n in (4, 1, 7, 2)],
    ]
    parts = list(zip(prompts, responses, strict=True))
    length = max(len(p) + sum(map(len, r)) for p, r in parts) + 2
    padded = [branch_row(p, r, length=length) for p, r in parts]
    return {name: np.concatenate([row[name] for row in padded]) for name in padded[0]}, parts


@pytest.fixture(scope="module")
def features(pair):
    """Each row's own image features [B, M, 256, W]; rows without an image have zeros."""
    encoded = nnx.jit(lambda model, images: model.encode_images(images))(pair.model, pair.pixels(2))
    nothing = jnp.zeros_like(encoded[0])
    return jnp.stack([encoded[0], nothing, encoded[1], nothing])[:, None]


def test_rows_of_branches_equal_separate_sequences(pair, rows, features):
    arrays, parts = rows
    joined = hidden_of_rows(pair.model, arrays["tokens"], arrays["positions"], arrays["branches"], features)
    apart = [(i, k, prompt + response) for i, (prompt, rs) in enumerate(parts) for k, response in enumerate(rs)]
    length = max(len(sequence) for *_, sequence in apart)
    tokens, branches = np.zeros((len(apart), length), int), np.full((len(apart), length), -1)
    for row, (*_, sequence) in enumerate(apart):
        tokens[row, : len(sequence)], branches[row, : len(sequence)] = sequence, 0
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    single = hidden_of_rows(pair.model, tokens, positions, branches, features[np.array([i for i, *_ in apart])])
    for row, (i, k, sequence) in enumerate(apart):
        mine = joined[i][(arrays["branches"][i] == 0) | (arrays["branches"][i] == k + 1)]
        assert relative(mine, np.asarray(single[row, : len(sequence)])) < 1e-5


def test_rows_of_branches_equal_the_oracle(pair, rows, features):
    arrays, _ = rows
    tokens, positions, branches = arrays["tokens"], arrays["positions"], arrays["branches"]
    joined = hidden_of_rows(pair.model, tokens, positions, branches, features)
    expected = pair.oracle.hidden_states(tokens, pair.pixels(2), train=True, positions=positions, branches=branches)[-1]
    valid = branches >= 0
    np.testing.assert_allclose(joined[valid], expected[valid], rtol=0, atol=5e-5)
    # All images in order of appearance are the same as each row's own.
    listed = hidden_of_rows(pair.model, tokens, positions, branches, features[np.array([0, 2]), 0])
    np.testing.assert_allclose(listed[valid], joined[valid], rtol=0, atol=1e-5)
