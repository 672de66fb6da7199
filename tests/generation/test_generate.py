"""Generation: golden's replies, padding, stops, images over a batch, sampling, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import silkie_jax
from silkie_jax.errors import UserError
from silkie_jax.generation.generate import _generate, generate, sample

# Golden


@pytest.mark.parametrize(
    "case", ["text", "image", "crossing_seq_length", "prompt_beyond_seq_length", "left_padded_batch"]
)
def test_golden_greedy(reference_data, golden_model, case):
    expected = reference_data.json("generation")["generate"][case]
    tokens = np.array(expected["prompt_ids"])
    ids = silkie_jax.generate(
        golden_model,
        tokens,
        reference_data.images(tokens),
        expected["kw"]["max_new_tokens"],
        mask=expected["attention_mask"],
    )
    np.testing.assert_array_equal(ids, expected["new_ids"])


@pytest.mark.parametrize("case", ["text", "image", "two_images_history", "system", "text_custom_stop"])
def test_golden_chat(reference_data, golden_model, case):
    """The official chat method stops at <|im_start|>, <|im_end|> and the caller's words, then writes <|endoftext|>."""
    expected = reference_data.json("generation")["chat"][case]
    tokens, new = np.array([expected["prompt_ids"]]), expected["new_ids"]
    end_of_text = golden_model.config.end_of_text
    stop = [end_of_text + 1, end_of_text + 2, *(expected.get("stop_words_ids_argument") or [])]
    ids = generate(golden_model, tokens, reference_data.images(tokens), expected["max_new_tokens"], stop=stop)
    # The official code writes <|endoftext|> after a stop word (here 244), as ours does to the full width.
    assert np.asarray(ids)[0].tolist() == new + [end_of_text] * (expected["max_new_tokens"] - len(new))


# Prompts and padding. The tiny model, 10 ids from prompts of 12.

WIDTH = 10


@pytest.fixture(scope="module")
def prompts(pair):
    return pair.text(3, 12, seed=5)


@pytest.fixture(scope="module")
def replies(pair, prompts):
    return np.asarray(generate(pair.model, prompts, None, WIDTH))


def test_greedy_equals_the_oracle(pair, prompts, replies):
    ids, scores = pair.oracle.greedy(prompts, None, WIDTH)
    best = np.sort(scores, axis=-1)
    assert (best[..., -1] - best[..., -2]).min() > 1e-3  # no tie decides this test
    np.testing.assert_array_equal(replies, ids)
    assert replies.dtype == np.int32
    assert len({tuple(reply) for reply in replies.tolist()}) == 3


def test_beyond_seq_length_equals_the_oracle(short_pair):
    """The prompt of 30 (seq_length is 24) has NTK factor 3; it stays so when the reply crosses 48, where 7 begins."""
    tokens, mask = short_pair.text(2, 30), np.ones((2, 30), bool)
    mask[0, :8] = False
    ids = generate(short_pair.model, tokens, None, 24, mask)
    np.testing.assert_array_equal(ids, short_pair.oracle.greedy(tokens, None, 24, mask)[0])


def test_a_batch_equals_its_rows_alone(pair, prompts, replies):
    for prompt, reply in zip(prompts, replies, strict=True):
        np.testing.assert_array_equal(generate(pair.model, prompt[None], None, WIDTH), [reply])


def test_padding_on_either_side_changes_nothing(pair, prompts, replies):
    left = np.pad(prompts, ((0, 0), (5, 0)), constant_values=-100)
    right = np.pad(prompts, ((0, 0), (0, 5)), constant_values=-100)
    both = np.stack([left[0], np.roll(left[1], -3), right[2]])
    for tokens in (left, right, both):
        np.testing.assert_array_equal(generate(pair.model, tokens, None, WIDTH, tokens != -100), replies)
    np.testing.assert_array_equal(generate(pair.model, jnp.asarray(left), None, WIDTH, (left >= 0).tolist()), replies)


def test_images_over_a_batch_equal_the_oracle(pair):
    """Two images, none, one; padding on the right, on the left and none."""
    span = pair.image_span()
    words = pair.text(3, 30, seed=2).tolist()
    rows = [words[0][:5] + span + words[0][5:9] + span + words[0][9:14], words[1][:20], [*span, *words[2][:9]]]
    length = max(map(len, rows))
    tokens, mask = np.zeros((3, length), int), np.zeros((3, length), int)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if i == 1 else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, 1
    images = pair.pixels(3, seed=4)
    ids = np.asarray(generate(pair.model, tokens, images, 2, mask))
    np.testing.assert_array_equal(ids, pair.oracle.greedy(tokens, images, 2, mask)[0])


# Stops


def after(reply, position, end_of_text):
    """The reply as it is when `position` ends it."""
    return [*reply[: position + 1], *[end_of_text] * (len(reply) - position - 1)]


def test_stops_by_id_and_by_sequence(pair, prompts, replies):
    eot = pair.model.config.end_of_text
    one, pair_of_ids = int(replies[0, 3]), [int(i) for i in replies[1, 5:7]]
    stop = [one, pair_of_ids, [], list(range(WIDTH + 5))]  # the empty one and one longer than the reply never match
    out = np.asarray(generate(pair.model, prompts, None, WIDTH, stop=stop)).tolist()
    for row, reply in enumerate(replies.tolist()):
        ends = [i for i, token in enumerate(reply) if token == one or reply[max(i - 1, 0) : i + 1] == pair_of_ids]
        assert out[row] == (after(reply, ends[0], eot) if ends else reply)
    assert out[0] == after(replies[0].tolist(), replies[0].tolist().index(one), eot)
    assert out[1][6:] == [pair_of_ids[1], *[eot] * (WIDTH - 7)]


def test_a_stop_may_be_one_id(pair, prompts, replies):
    first = int(replies[2, 0])
    out = generate(pair.model, prompts[2:], None, WIDTH, stop=np.int64(first))
    assert np.asarray(out)[0].tolist() == [first, *[pair.model.config.end_of_text] * (WIDTH - 1)]


def test_end_of_text_ends_a_reply(pair, prompts, replies):
    """An output layer that always prefers end-of-text, from the first step on."""
    model = nnx.clone(pair.model)
    weight = model.language.lm_head.weight[...]
    model.language.lm_head.weight[...] = weight.at[pair.model.config.end_of_text].set(100 * weight[replies[0, 0]])
    out = np.asarray(generate(model, prompts, None, WIDTH))
    assert (out[0] == pair.model.config.end_of_text).all()


# Sampling


def test_seeds(pair, prompts):
    def draw(seed):
        return np.asarray(generate(pair.model, prompts, None, WIDTH, temperature=1.0, seed=seed))

    first = draw(0)
    np.testing.assert_array_equal(draw(0), first)
    assert (draw(1) != first).any()
    assert (draw(2**32 - 1) != first).any()


@pytest.mark.parametrize("options", [{"top_p": 1e-6}, {"top_p": 1e-60}, {"temperature": 1e-4}, {"temperature": 1e-60}])
def test_the_limits_of_sampling_are_greedy(pair, prompts, replies, options):
    out = generate(pair.model, prompts, None, WIDTH, **{"temperature": 1.0, "seed": 3} | options)
    np.testing.assert_array_equal(out, replies)


def test_equal_prompts_of_a_batch_are_drawn_apart(pair, prompts):
    out = np.asarray(generate(pair.model, prompts[[0, 0, 0]], None, WIDTH, temperature=1.0))
    assert len({tuple(row) for row in out.tolist()}) == 3


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize(("top_p", "kept"), [(1.0, 6), (0.9, 4), (0.75, 3), (0.5, 2), (0.4, 1)])
def test_draws_follow_the_nucleus(temperature, top_p, kept):
    """20,000 draws at logits whose probabilities at this temperature are known: the smallest set that reaches top_p."""
    p = np.array([0.42, 0.03, 0.25, 0.10, 0.18, 0.02])
    order = np.argsort(-p)
    logits = temperature * np.log(p) + 5
    draw = jax.vmap(sample, in_axes=(None, None, None, 0))
    keys = jax.random.split(jax.random.key(7), 20_000)
    ids = np.asarray(draw(jnp.asarray(logits[None], jnp.float32), temperature, top_p, keys))[:, 0]
    expected = np.zeros(6)
    expected[order[:kept]] = p[order[:kept]] / p[order[:kept]].sum()
    frequencies = np.bincount(ids, minlength=6) / len(ids)
    assert set(np.flatnonzero(frequencies)) == set(order[:kept])
    np.testing.assert_allclose(frequencies, expected, atol=4 * 0.5 / np.sqrt(len(ids)))


def test_first_ids_follow_the_models_probabilities(pair, prompts):
    """512 equal prompts: the first ids are distributed as the logits say, within four standard deviations."""
    many = np.repeat(prompts[:1], 512, axis=0)
    ids = np.asarray(generate(pair.model, many, None, 1, temperature=0.5, seed=1))[:, 0]
    p = np.asarray(jax.nn.softmax(pair.model(prompts[:1])[0, -1] / 0.5))
    for token in np.argsort(-p)[:5]:
        assert abs((ids == token).mean() - p[token]) < 4 * np.sqrt(p[token] / 512)
    assert p[ids].mean() == pytest.approx((p**2).sum(), rel=0.25)


# Compilation


def test_options_that_are_numbers_compile_once(pair, prompts):
    generate(pair.model, prompts, None, WIDTH, temperature=1.0)
    before = _generate._cache_size()
    generate(pair.model, prompts.astype(np.int32), None, WIDTH, temperature=0.3, top_p=0.8, seed=9)
    generate(pair.model, prompts.tolist(), [], WIDTH, mask=np.ones(prompts.shape, int), temperature=2, stop=[[]])
    assert _generate._cache_size() == before


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -0.5}, "temperature must be 0 .* not -0.5"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**32}, "seed must be"),
        ({"stop": "stop"}, "stop must hold ids"),
        ({"stop": [[1, 2], "x"]}, "stop must hold ids"),
        ({"stop": [[[1, 2]]]}, "stop must hold ids"),
        ({"mask": np.zeros((1, 260), bool)}, "0 <img> spans but 1 images"),
        ({"mask": np.ones((1, 3), bool)}, "mask must have the shape"),
        ({"tokens": np.zeros((2, 0), int), "images": None}, "at least one token"),
        ({"tokens": [[1, 2], [3, 4]], "mask": [[1, 1], [0, 0]], "images": None}, "a prompt is empty"),
        ({"tokens": [[999, 1]], "images": None}, "token id 999 is outside"),
        ({"images": None}, "1 <img> spans but 0 images"),
        ({"images": np.zeros((1, 8, 8, 3), np.uint8)}, "images must be uint8"),
        ({"mask": np.arange(260)[None] != 100}, "image span is cut"),  # a hole in the middle of an image
    ],
)
def test_what_is_refused(pair, options, message):
    arguments = {"tokens": [[7, *pair.image_span(), 8]], "images": pair.pixels(1), "max_new_tokens": 4} | options
    with pytest.raises(UserError, match=message) as error:
        generate(pair.model, **arguments)
    assert "\n" not in str(error.value)
