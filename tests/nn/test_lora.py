"""LoRA: golden's adapter on, off and merged; how an adapter starts; where its gradients are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.config import QWEN_VL_CHAT
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.nn.lora import add_lora, linears, matches
from tests.models.qwen_vl.test_model import check_logits
from tests.reference import qwen_vl as reference
from tests.reference.objective import log_softmax

SILKIE = ("c_attn", "attn.c_proj", "w1", "w2")
CASES = ["text_short", "one_image", "long_alpha3_image"]


@pytest.fixture(scope="module")
def adapted(reference_data):
    return load_model(reference_data.checkpoint, adapter=reference_data.adapter)


@pytest.fixture(scope="module")
def merged(adapted):
    """Every adapted weight W replaced by W + alpha/r B A, and no adapter."""
    model = nnx.clone(adapted)
    for _, linear in linears(model.language.layers):
        if linear.lora_a is not None:
            a, b = np.asarray(linear.lora_a[...], np.float64), np.asarray(linear.lora_b[...], np.float64)
            delta = linear.lora_scale * np.einsum("l...r,lri->l...i", b, a)
            linear.weight[...] = jnp.asarray(linear.weight[...] + delta, jnp.float32)
            linear.lora_a = linear.lora_b = None
            linear.lora_scale = 0.0
    return model


@pytest.mark.parametrize("case", CASES)
def test_golden_adapter(reference_data, adapted, case):
    tokens = reference_data[f"{case}/input_ids"]
    logits = adapted(tokens, reference_data.images(tokens))
    check_logits(reference_data.lora, f"{case}/adapter_eval", logits, tokens, np.ones(tokens.shape, bool))


@pytest.mark.parametrize("case", CASES)
def test_golden_merged(reference_data, merged, case):
    tokens = reference_data[f"{case}/input_ids"]
    positions = reference_data.lora[f"{case}/adapter_eval_logits_pos"]
    logits = np.asarray(merged(tokens, reference_data.images(tokens)))[:, positions]
    tolerance = 5e-4 if tokens.shape[1] > 600 else 2e-4
    expected = reference_data.lora[f"{case}/merged_eval_logits"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)


def test_golden_merged_weight(reference_data, merged):
    expected = reference_data.lora["merged/transformer.h.0.attn.c_proj.weight"]
    ours = merged.language.layers.attn.c_proj.weight[...][0]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


@nnx.jit(static_argnames="adapter")
def hidden(model, tokens, adapter):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.hidden(tokens, positions, jnp.zeros_like(tokens), None, train=True, adapter=adapter)


def test_adapter_off_is_the_base(reference_data, adapted, golden_model):
    tokens = reference_data["text_short/input_ids"]
    off, base = hidden(adapted, tokens, False), hidden(golden_model, tokens, True)
    np.testing.assert_array_equal(off, base)
    assert np.abs(hidden(adapted, tokens, True) - base).max() > 0.1


# A new adapter


def with_lora(model, **options):
    model = nnx.clone(model)
    add_lora(model, **{"rank": 3, "alpha": 6, "targets": SILKIE, "rngs": nnx.Rngs(0)} | options)
    return model


def factors(model):
    return dict(nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))


def test_an_adapter_starts_as_the_base(pair):
    model, tokens = with_lora(pair.model), pair.text(1, 12)
    np.testing.assert_array_equal(hidden(model, tokens, True), hidden(pair.model, tokens, True))
    for path, variable in factors(model).items():
        values = np.asarray(variable[...])
        if path[-1] == "lora_b":
            assert (values == 0).all()
        else:  # uniform in +-1/sqrt(in), drawn anew for every layer and matrix
            bound = 1 / np.sqrt(values.shape[-1])
            assert 0.9 * bound < np.abs(values).max() <= bound
            assert (values[0] != values[1]).any()
    assert not factors(pair.model)


def test_an_adapters_shapes_and_scale(pair):
    model = with_lora(pair.model, targets=["attn.c_attn"], rank=5, alpha=20)
    c_attn = model.language.layers.attn.c_attn
    assert (c_attn.lora_a.shape, c_attn.lora_b.shape) == ((2, 5, 128), (2, 3, 128, 5))
    assert (c_attn.lora_a.axes, c_attn.lora_b.axes) == (("rank", "embed"), (None, "heads", "rank"))
    assert c_attn.lora_scale == 4.0
    assert len(factors(model)) == 2
    half = with_lora(pair.model, dtype=jnp.bfloat16, scale=0.25)
    assert half.language.layers.mlp.w1.lora_a.dtype == jnp.bfloat16
    assert half.language.layers.mlp.w1.lora_scale == 0.25


def test_silkies_adapter_at_full_size():
    """facts of the paper's recipe: 128 modules, 112,197,632 parameters."""

    def build():
        model = QwenVL(QWEN_VL_CHAT, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        add_lora(model, 64, 16, SILKIE, rngs=nnx.Rngs(1))
        return model

    lora = factors(nnx.eval_shape(build))
    assert sum(variable.size for variable in lora.values()) == 112_197_632
    assert sum(variable.shape[0] for path, variable in lora.items() if path[-1] == "lora_a") == 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1, not 0"),
        ({"targets": ["c_attn", "q_proj"]}, "lora.targets: 'q_proj' matches no decoder layer; there are .*attn.c_attn"),
        ({"targets": ["in_proj"]}, "'in_proj' matches no decoder layer"),  # the vision tower's
        ({"targets": ["proj"]}, "'proj' matches no decoder layer"),  # the end of a name, but not of a module
        ({"targets": []}, "lora.targets is empty"),
    ],
)
def test_what_is_refused(pair, options, message):
    with pytest.raises(UserError, match=message) as error:
        with_lora(pair.model, **options)
    assert "\n" not in str(error.value)


def test_targets():
    assert matches("attn.c_proj", ["c_proj"])
    assert matches("mlp.c_proj", ["mlp.c_proj"])
    assert not matches("mlp.c_proj", ["attn.c_proj", "proj", "c_pro"])


def test_one_target_as_text(pair):
    assert {path[-2] for path in factors(with_lora(pair.model, targets="c_proj"))} == {"c_proj"}


# Gradients


def test_gradients_of_the_adapter_only(pair):
    """Gradients exist for the adapter alone, and are those of the oracle's loss by finite differences."""
    model, tokens = with_lora(pair.model), pair.text(1, 12)
    rng = np.random.default_rng(0)
    for variable in jax.tree.leaves(nnx.state(model, nnx.LoRAParam), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        values = rng.standard_normal(variable.shape).astype(np.float32) / 8
        variable[...] = jnp.asarray(values)

    @nnx.jit
    def gradient(model, tokens):
        def loss(model):
            logps = jax.nn.log_softmax(model(tokens, train=True)[:, :-1])
            return -jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1).mean()

        return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)

    value, gradients = gradient(model, tokens)
    flat = dict(nnx.to_flat_state(gradients))
    assert set(flat) == set(factors(model))
    assert len(flat) == 8

    lora = oracle_adapter(model)

    def loss():
        logps = log_softmax(reference.QwenVL(pair.oracle.tensors, pair.oracle.config, lora)(tokens, train=True))
        return -np.take_along_axis(logps[:, :-1], tokens[:, 1:, None], axis=-1).mean()

    assert float(value) == pytest.approx(loss(), rel=1e-5)
    for path, variable in flat.items():
        ours = np.asarray(variable[...], np.float64)
        module = "transformer.h.1." + ".".join(path[2:-1])
        weight = lora[0][f"{module}.lora_{path[-1][-1].upper()}.weight"]
        direction = rng.standard_normal(weight.shape)
        start, step = weight.copy(), 1e-5
        ends = []
        for sign in (1, -1):
            weight[...] = start + sign * step * direction
            ends.append(loss())
        weight[...] = start
        slope = (ends[0] - ends[1]) / (2 * step)
        assert (ours[1].reshape(weight.shape) * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-6), path


def oracle_adapter(model):
    """The model's adapter as the oracle takes one: PEFT's tensors and configuration."""
    tensors = {}
    for path, variable in factors(model).items():
        for i, values in enumerate(np.asarray(variable[...], np.float64)):
            name = f"transformer.h.{i}.{'.'.join(path[2:-1])}.lora_{path[-1][-1].upper()}.weight"
            tensors[name] = values if path[-1] == "lora_a" else values.reshape(-1, values.shape[-1])
    return tensors, {"lora_alpha": 6, "r": 3}
