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
from silkie_jax.nn.quantize import decode, encode, product
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


def test_what_is_coded_while_loading_is_what_coding_a_loaded_model_gives(folder):
    expected = load_model(folder)
    expected.quantize()
    sharded = load_model(folder, sharding_of=partial(sharding_of, make_mesh(2, 2, 2)), quantize="int8")
    loaded = load_model(folder, dtype="bfloat16", param_dtype="float32", quantize="int8")
    wanted = by_path(nnx.state(expected, nnx.Param))
    for model in (sharded, loaded):
        ours = by_path(nnx.state(model, nnx.Param))
        assert ours.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=name)
    coded = {name for name, array in wanted.items() if array.dtype == np.int8}
    assert {"language.wte", "language.layers.mlp.w1.weight", "visual.layers.attn.in_proj.weight"} <= coded
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


def errors(make, tokens, images):
    """Relative errors of hidden states: computed in bfloat16, and with codes (in float32: theirs alone)."""
    exact = hidden_states(make("float32"), tokens, images)
    coded = make("float32")
    coded.quantize()
    found = (hidden_states(make("bfloat16"), tokens, images), hidden_states(coded, tokens, images))
    return [np.linalg.norm(states - exact) / np.linalg.norm(exact) for states in found]


def test_golden_errors_are_below_two_and_a_half_times_those_of_bfloat16(reference_data):
    tokens = reference_data["one_image/input_ids"]
    half, coded = errors(
        lambda dtype: load_model(reference_data.checkpoint, dtype=dtype), tokens, reference_data.images(tokens)
    )
    assert 0 < coded < 2.5 * half, (coded, half)


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
