"""The whole model: golden's language cases, what it accepts and refuses, bfloat16, compilation, full size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.errors import UserError
from silkie_jax.generation.generate import _generate
from silkie_jax.models.qwen_vl.config import QWEN_VL_CHAT, QwenVLConfig
from silkie_jax.models.qwen_vl.language import frequencies, rotation
from silkie_jax.models.qwen_vl.model import QwenVL, _logits
from silkie_jax.nn.attention import PLAIN
from tests.pairs import layer
from tests.reference.golden import LANGUAGE_CASES
from tests.reference.objective import log_softmax

# Golden, by the public call


def check_logits(data, prefix, logits, tokens, valid):
    """Everything that golden keeps of one case and mode, at the positions of tokens."""
    tolerance = 5e-4 if tokens.shape[1] > 600 else 2e-4
    logits = np.asarray(logits, np.float64)
    positions = data[f"{prefix}_logits_pos"]
    at = valid[:, positions]
    np.testing.assert_allclose(logits[:, positions][at], data[f"{prefix}_logits"][at], rtol=0, atol=tolerance)
    logps = log_softmax(logits)
    logsumexp = (logits - logps)[..., 0]
    np.testing.assert_allclose(logsumexp[valid], data[f"{prefix}_logsumexp"][valid], rtol=0, atol=tolerance)
    next_logp = np.take_along_axis(logps[:, :-1], tokens[:, 1:, None].astype(int), axis=-1)[..., 0]
    both = valid[:, 1:] & valid[:, :-1]
    np.testing.assert_allclose(next_logp[both], data[f"{prefix}_next_token_logp"][both], rtol=0, atol=tolerance)
    best, margin = np.sort(logits, axis=-1), data[f"{prefix}_top1_margin"]
    np.testing.assert_allclose((best[..., -1] - best[..., -2])[valid], margin[valid], rtol=0, atol=2 * tolerance)
    clear = valid & (margin > 1e-3)
    assert clear.sum() > 0.9 * valid.sum()
    np.testing.assert_array_equal(logits.argmax(axis=-1)[clear], data[f"{prefix}_argmax"][clear])


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_golden(reference_data, golden_model, case, train):
    tokens, mask = reference_data[f"{case}/input_ids"], reference_data[f"{case}/attention_mask"]
    logits = golden_model(tokens, reference_data.images(tokens), mask, train=train)
    assert (logits.dtype, logits.shape) == (jnp.float32, (*tokens.shape, 1152))
    # Golden leaves the training arrays out where they equal those of evaluation: up to seq_length tokens.
    mode = "train" if train and f"{case}/train_logits" in reference_data else "eval"
    check_logits(reference_data, f"{case}/{mode}", logits, tokens, mask == 1)


def test_golden_hidden_states(reference_data, golden_model):
    tokens = reference_data["one_image/input_ids"]

    @nnx.jit
    def states(model, tokens, images):
        features = model.encode_images(images)
        positions, branches = jnp.arange(tokens.shape[1])[None], jnp.zeros_like(tokens)
        embedded = model.embed(tokens, features)
        first = layer(model.language.layers, 0)
        r = rotation(model.config, positions, frequencies(model.config, 1.0), train=False)
        after_first = first(embedded, r, PLAIN.among(branches))
        return embedded, after_first, model.hidden(tokens, positions, branches, features, train=False)

    names = ("hidden_0", "hidden_1", "hidden_final_after_ln_f")
    for state, name in zip(states(golden_model, tokens, reference_data.images(tokens)), names, strict=True):
        expected = reference_data[f"one_image/eval_{name}"]
        np.testing.assert_allclose(state[:, ::4], expected, rtol=0, atol=5e-5, err_msg=name)


def test_what_fills_an_image_span_does_not_matter(reference_data, golden_model):
    """Golden's spans hold the bytes of a path; ours hold <imgpad>."""
    tokens = reference_data["one_image/input_ids"]
    start = int(np.argwhere(tokens[0] == 1070)[0, 0])
    filled = tokens.copy()
    filled[0, start + 1 : start + 257] = 1072
    assert (filled != tokens).any()
    images = reference_data.images(tokens)
    np.testing.assert_array_equal(golden_model(filled, images), golden_model(tokens, images))


# What the call accepts


@pytest.fixture(scope="module")
def text(short_pair):
    """Ids [2, 12], padding on the right of one row and the left of the other, and the logits of its tokens."""
    tokens, mask = short_pair.text(2, 12), np.ones((2, 12), bool)
    mask[0, -3:] = mask[1, :4] = False
    return tokens, mask, np.asarray(short_pair.model(tokens, mask=mask))[mask]


@pytest.mark.parametrize(
    "form",
    [
        lambda tokens, mask: (tokens.tolist(), mask.tolist()),
        lambda tokens, mask: (tokens.astype(np.int64), mask.astype(np.int64)),
        lambda tokens, mask: (tokens.astype(np.uint16), mask.astype(np.float32)),
        lambda tokens, mask: (jnp.asarray(tokens), jnp.asarray(mask, jnp.int8)),
        lambda tokens, mask: (tokens, np.where(mask, 1, 5)),  # the official code masks whatever is not 1
        lambda tokens, mask: (np.where(mask, tokens, -100), mask),
    ],
    ids=["lists", "int64", "uint16-float", "device", "mask-of-ids", "padding-of-minus-100"],
)
def test_forms_of_tokens_and_mask(short_pair, text, form):
    tokens, mask = form(*text[:2])
    before = _logits._cache_size()
    np.testing.assert_array_equal(np.asarray(short_pair.model(tokens, mask=mask))[text[1]], text[2])
    assert _logits._cache_size() == before  # and none of them compiles anew


def test_padding_that_looks_like_an_image_is_padding(short_pair, text):
    tokens, mask, expected = text
    disguised = np.where(mask, tokens, short_pair.model.config.image_start)
    np.testing.assert_array_equal(np.asarray(short_pair.model(disguised, mask=mask))[mask], expected)


def test_no_mask_is_all_tokens(short_pair):
    tokens = short_pair.text(2, 12)
    expected = np.asarray(short_pair.model(tokens, mask=np.ones((2, 12), bool)))
    np.testing.assert_allclose(short_pair.model(tokens), expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(short_pair.model(tokens, []), short_pair.model(tokens))


def test_forms_of_images(pair):
    tokens, images = np.array([[*pair.image_span(), 1, 2]]), pair.pixels(1)
    expected = np.asarray(pair.model(tokens, images))
    for form in (jnp.asarray(images), list(images), [jnp.asarray(images[0])]):
        np.testing.assert_array_equal(pair.model(tokens, form), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [1, 2, 3]}, r"tokens must be integers \[B, T\].*int64 \[3\]"),
        ({"tokens": np.ones((1, 3))}, "tokens must be integers .* not float64"),
        ({"tokens": np.ones((2, 0), int)}, "at least one token"),
        ({"tokens": [[1, 2], [3]]}, "tokens must be an array"),
        ({"tokens": [[1, 768]]}, "token id 768 is outside the vocabulary of 768"),
        ({"tokens": [[-1, 5]]}, "token id -1 is outside"),
        ({"tokens": [[2**40, 5]]}, "token id 1099511627776 is outside"),
        ({"mask": np.ones((1, 5), bool)}, r"mask must have the shape of tokens, \[1, 260\], not \[1, 5\]"),
        ({"mask": np.ones(260, bool)}, "mask must have the shape"),
        ({"images": None}, "1 <img> spans but 0 images"),
        ({"images": np.zeros((2, 56, 56, 3), np.uint8)}, "1 <img> spans but 2 images"),
        ({"tokens": [[1, 2]]}, "0 <img> spans but 1 images"),
        (
            {"images": np.zeros((1, 28, 28, 3), np.uint8)},
            r"images must be uint8 \[N, 56, 56, 3\], not uint8 .*read_image",
        ),
        ({"images": np.zeros((56, 56, 3), np.uint8)}, "images must be uint8"),
        ({"images": np.zeros((1, 56, 56, 3), np.float32)}, "not float32"),
        ({"images": [np.zeros((56, 56, 3), np.uint8), np.zeros((28, 28, 3), np.uint8)]}, "images must be an array"),
        ({"images": "picture.jpg"}, "images must be uint8"),
        ({"cut": 258}, "image span is cut"),
        ({"cut": 100}, "image span is cut"),
        ({"end": 258}, "image span is cut"),
    ],
)
def test_what_is_refused(pair, change, message):
    assert pair.model.config.vocab_size == 768
    tokens = np.array([[7, *pair.image_span(), 8]])
    if "cut" in change:
        tokens = tokens[:, : change["cut"]]
    if "end" in change:
        tokens[0, change["end"]] = 5
    arguments = {"tokens": tokens, "images": pair.pixels(1)} | {
        k: v for k, v in change.items() if k not in ("cut", "end")
    }
    with pytest.raises(UserError, match=message) as error:
        pair.model(**arguments)
    assert "\n" not in str(error.value)


# Compilation


def test_equal_shapes_compile_once(short_pair):
    before = _logits._cache_size()
    for seed in range(3):
        short_pair.model(short_pair.text(1, 9, seed=seed))
    assert _logits._cache_size() == before + 1
    short_pair.model(short_pair.text(1, 9), train=True)
    assert _logits._cache_size() == before + 2


def test_the_model_works_inside_jit_and_grad(short_pair):
    """Values cannot be checked while tracing; everything else is the same."""
    tokens, mask = short_pair.text(2, 12), np.ones((2, 12), bool)
    mask[1, :4] = False
    expected = np.asarray(short_pair.model(tokens, mask=mask))[mask]
    closed = jax.jit(lambda tokens, mask: short_pair.model(tokens, mask=mask))(tokens, mask)
    np.testing.assert_allclose(closed[mask], expected, rtol=0, atol=1e-5)

    @nnx.jit
    def loss(model, tokens):
        return nnx.value_and_grad(lambda model: jax.nn.logsumexp(model(tokens, train=True)).mean())(model)

    value, gradients = loss(short_pair.model, tokens)
    assert np.isfinite(value)
    assert np.abs(gradients["language"]["layers"]["attn"]["c_attn"]["weight"][...]).max() > 0


def equations(jaxpr) -> int:
    """Equations of a jaxpr and of all that is nested in it."""
    return len(jaxpr.eqns) + sum(
        equations(getattr(inner, "jaxpr", inner))
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        for inner in (value if isinstance(value, tuple | list) else [value])
        if hasattr(getattr(inner, "jaxpr", inner), "eqns")
    )


def abstractly(config, dtype=jnp.bfloat16):
    return nnx.split(nnx.eval_shape(lambda: QwenVL(config, dtype=dtype, rngs=nnx.Rngs(0))))


def test_programs_do_not_grow_with_depth(pair):
    def size(layers):
        fields = pair.model.config.to_dict()
        fields |= {"num_hidden_layers": layers, "visual": fields["visual"] | {"layers": layers + 1}}
        config = QwenVLConfig.from_dict(fields)
        graph, state = abstractly(config)
        tokens, images = jnp.zeros((1, 300), int), jnp.zeros((1, 56, 56, 3), jnp.uint8)
        forward = jax.make_jaxpr(partial(_logits, graph, train=False))(state, tokens, images, None)
        key, number = jax.random.key(0), jnp.float32(1)
        generation = partial(_generate, graph, max_new_tokens=8, stops=(), greedy=True)
        generated = jax.make_jaxpr(generation)(state, tokens, images, tokens == 0, number, number, key)
        return equations(forward.jaxpr), equations(generated.jaxpr)

    assert size(2) == size(7)
    assert min(size(2)) > 100


# Full size, with shapes in place of arrays


def test_full_size():
    graph, state = abstractly(QWEN_VL_CHAT)
    sizes = {path[0]: 0 for path, _ in nnx.to_flat_state(state)}
    for path, variable in nnx.to_flat_state(state):
        sizes[path[0]] += variable.size
        assert variable.dtype == jnp.bfloat16
    assert sum(sizes.values()) == 9_656_935_168
    assert sizes["visual"] == 1_935_610_624
    shape = jax.ShapeDtypeStruct
    tokens, images = shape((1, 300), jnp.int32), shape((1, 448, 448, 3), jnp.uint8)
    logits = jax.eval_shape(partial(_logits, graph, train=False), state, tokens, images, None)
    assert (logits.shape, logits.dtype) == ((1, 300, 151_936), jnp.float32)


# bfloat16


def test_bfloat16_is_float32_up_to_its_precision(pair):
    """The same weights, rounded: logits stay near, at the end of a long row as at its beginning."""
    model = load_model(pair.folder, dtype="bfloat16")
    kinds = {variable.dtype for variable in jax.tree.leaves(nnx.state(model))}
    assert kinds == {jnp.dtype(jnp.bfloat16)}
    tokens, images = np.array([pair.image_span() + pair.text(350).tolist()]), pair.pixels(1)
    exact, logits = np.asarray(pair.model(tokens, images)), model(tokens, images)
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - exact).mean(-1)[0] / exact.std()
    assert error.mean() < 0.03
    assert error[-50:].mean() < 1.5 * error[300:350].mean()


def test_float32_parameters_computed_in_bfloat16(pair):
    model = load_model(pair.folder, dtype="bfloat16", param_dtype="float32")
    assert model.language.lm_head.weight.dtype == jnp.float32
    tokens = pair.text(1, 40)
    logits, exact = np.asarray(model(tokens)), np.asarray(pair.model(tokens))
    assert 1e-4 < np.abs(logits - exact).mean() / exact.std() < 0.03
