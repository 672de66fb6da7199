"""Weights in 8 bits: how far they are off, what a product keeps, and a model whose weights are so kept."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from silkie_jax.checkpoints.weights import load_model, save_model
from silkie_jax.errors import UserError
from silkie_jax.hardware.mesh import make_mesh, sharding_of
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.nn.quantize import METHODS, decode, encode, product
from silkie_jax.scoring.fingerprints import weights_fingerprint
from tests.training.support import by_path, make_tiny


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_codes_are_off_by_half_a_step_at_most():
    weight = random(3, 5, 64)
    weight[1, 2] = 0
    codes, scale = encode(weight)
    assert (codes.dtype, scale.dtype, scale.shape) == (np.int8, jnp.bfloat16, (3, 5))
    step = np.asarray(scale, np.float32)[..., None]
    off = np.abs(codes * step - weight)
    # The largest of a channel is off by more where its scale was rounded down: 127 steps by 1 part of 512 each.
    assert (off <= step * (0.5 + 1e-5)).all()
    assert not codes[1, 2].any()


def test_codes_in_fp8_have_three_bits_after_the_point():
    weight = random(3, 5, 64)
    weight[1, 2] = 0
    codes, scale = encode(weight, jnp.float8_e4m3fn)
    assert (codes.dtype, scale.dtype, scale.shape) == (jnp.float8_e4m3fn, jnp.bfloat16, (3, 5))
    values, step = codes.astype(np.float32), np.asarray(scale, np.float32)[..., None]
    assert np.isfinite(values).all()
    assert (np.abs(values).max(-1) >= 416).sum() == 14  # of 448, all but the channel of zeros
    # Half a unit in the last place, which below 2^-6 is that of 2^-6.
    assert (np.abs(values * step - weight) <= np.maximum(np.abs(weight) / 16, step * 2**-10) * (1 + 1e-5)).all()


def in_fp8(x, axes):
    """What a row becomes: e4m3 by its largest, and the same again as numbers."""
    step = np.abs(x).max(axis=axes, keepdims=True) / np.float32(448)
    return (x / np.where(step > 0, step, 1)).astype(jnp.float8_e4m3fn).astype(np.float64) * step


@pytest.mark.parametrize("out", [(7,), (3, 5)])
def test_the_product_in_fp8_is_that_of_rounded_rows(out):
    x, gradient = random(2, 4, 16), random(2, 4, *out, seed=1)
    x[1, 2] = 0
    x[0, 1] *= 1e30  # far beyond what e4m3 or an unscaled product of it could hold
    codes, scale = encode(random(*out, 16, seed=2), jnp.float8_e4m3fn)
    y, back = jax.vjp(lambda x: product(x, jnp.asarray(codes), jnp.asarray(scale)), jnp.asarray(x))
    weight = codes.astype(np.float64) * scale.astype(np.float64)[..., None]
    sums = tuple(range(-len(out), 0)), tuple(range(len(out)))
    scaled = gradient * scale.astype(np.float32)
    expected = np.tensordot(in_fp8(x, -1), weight, axes=(-1, -1))
    expected_back = np.tensordot(in_fp8(scaled, sums[0]), codes.astype(np.float64), axes=sums)
    for ours, wanted in ((y, expected), (back(jnp.asarray(gradient))[0], expected_back)):
        axes = tuple(range(2, wanted.ndim))
        assert (np.abs(ours - wanted) <= 1e-5 * np.abs(wanted).max(axis=axes, keepdims=True)).all()
    assert {(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(back)} == {
        (codes.dtype, codes.shape),
        (scale.dtype, scale.shape),
    }


def test_what_is_not_finite_stays_so_in_fp8():
    codes, scale = (jnp.asarray(part) for part in encode(random(3, 16), jnp.float8_e4m3fn))
    x = jnp.asarray(random(3, 16)).at[0, 0].set(jnp.inf).at[1, 0].set(jnp.nan)
    assert jnp.isfinite(product(x, codes, scale)).all(-1).tolist() == [False, False, True]


@pytest.mark.parametrize("out", [(7,), (3, 5)])
def test_the_product_and_its_gradient_are_those_of_the_decoded_weight(out):
    x, gradient = jnp.asarray(random(2, 4, 16)), jnp.asarray(random(2, 4, *out, seed=1))
    codes, scale = (jnp.asarray(part) for part in encode(random(*out, 16, seed=2)))

    def plain(x):
        return jnp.tensordot(x, decode(codes, scale, jnp.float32), axes=(-1, -1), precision="highest")

    y, back = jax.vjp(lambda x: product(x, codes, scale), x)
    expected, expected_back = jax.vjp(plain, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(back(gradient)[0], expected_back(gradient)[0], rtol=1e-5, atol=1e-5)
    # Kept are the codes and the scales: no copy of the weight in another type, and not x.
    assert {(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(back)} == {
        (codes.dtype, codes.shape),
        (scale.dtype, scale.shape),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_coded_while_loading_is_what_coding_a_loaded_model_gives(folder, method):
    expected = load_model(folder)
    expected.quantize(method)
    sharded = load_model(folder, sharding_of=partial(sharding_of, make_mesh(2, 2, 2)), quantize=method)
    loaded = load_model(folder, dtype="bfloat16", param_dtype="float32", quantize=method)
    wanted = by_path(nnx.state(expected, nnx.Param))
    for model in (sharded, loaded):
        ours = by_path(nnx.state(model, nnx.Param))
        assert ours.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
    coded = {name for name, array in wanted.items() if array.dtype == METHODS[method]}
    assert ("language.wte" in coded) == (method == "int8")  # embeddings are multiplied with nothing
    assert {"language.layers.mlp.w1.weight", "visual.layers.attn.in_proj.weight"} <= coded
    assert not any(part in name for name in coded for part in ("ln_", "lm_head", "attn_pool", "bias"))
    codes = sharded.language.layers.attn.c_attn
    assert codes.weight[...].sharding.spec[1:] == (None, "tensor", "fsdp")
    assert codes.scale[...].sharding.spec[1:] == (None, "tensor")
    with pytest.raises(UserError, match="weights in 8 bits are no checkpoint; load the model without quantize"):
        save_model(sharded, folder / "saved", like=folder)
    assert weights_fingerprint(sharded) == weights_fingerprint(loaded) != weights_fingerprint(load_model(folder))


def hidden_states(model, tokens, images):
    graph, state = nnx.split(model)

    @jax.jit
    def run(state):
        policy = nnx.merge(graph, state)
        features = policy.encode_images(images)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return policy.hidden(tokens, positions, jnp.zeros_like(tokens), features, train=True)

    return np.asarray(run(state), np.float64)


def errors(make, tokens, images, method="int8"):
    """Relative errors of hidden states: computed in bfloat16, and with codes (in float32: theirs alone)."""
    exact = hidden_states(make("float32"), tokens, images)
    coded = make("float32")
    coded.quantize(method)
    found = (hidden_states(make("bfloat16"), tokens, images), hidden_states(coded, tokens, images))
    return [np.linalg.norm(states - exact) / np.linalg.norm(exact) for states in found]


def test_golden_errors_are_below_two_and_a_half_times_those_of_bfloat16(reference_data):
    tokens = reference_data["one_image/input_ids"]
    half, coded = errors(
        lambda dtype: load_model(reference_data.checkpoint, dtype=dtype), tokens, reference_data.images(tokens)
    )
    assert 0 < coded < 2.5 * half, (coded, half)


def test_golden_errors_in_fp8_are_about_ten_times_those_of_bfloat16(reference_data):
    tokens = reference_data["one_image/input_ids"]
    half, coded = errors(
        lambda dtype: load_model(reference_data.checkpoint, dtype=dtype), tokens, reference_data.images(tokens), "fp8"
    )
    assert 4 * half < coded < 11 * half, (coded, half)


@pytest.mark.slow
def test_errors_of_the_scaled_model_are_too():
    from benchmarks.workload import SCALED, make_instructions

    made = make_instructions(SCALED, 1)[0]
    tokens = np.concatenate([made.prompt, made.responses[0]])[None]

    def make(dtype):
        # Drawn in float32 whatever is computed in: another type would draw other weights.
        return QwenVL(SCALED, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))

    half, coded = errors(make, tokens, made.image[None])
    assert half < 0.02  # else two models were compared
    assert 0 < coded < 2.5 * half, (coded, half)
