"""Fingerprints follow from contents alone: not from how arrays are sharded, and from every element and its place."""

from functools import partial

import jax.numpy as jnp
import pytest
from flax import nnx

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.hardware.mesh import make_mesh, sharding_of
from silkie_jax.nn.lora import add_lora, linears
from silkie_jax.scoring import fingerprints
from silkie_jax.scoring.fingerprints import adapter_fingerprint, weights_fingerprint
from tests.training.support import make_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def adapted(folder, *, alpha=4.0, seed=0):
    model = load_model(folder)
    add_lora(model, 2, alpha, ["w1"], rngs=nnx.Rngs(seed))
    return model


def test_sharding_changes_nothing(folder):
    sharded = load_model(folder, sharding_of=partial(sharding_of, make_mesh(2, 2, 2)))
    add_lora(sharded, 2, 4.0, ["w1"], rngs=nnx.Rngs(0))
    model = adapted(folder)
    assert weights_fingerprint(sharded) == weights_fingerprint(model)
    assert adapter_fingerprint(sharded) == adapter_fingerprint(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_host_and_device_make_the_same_checksums(folder, monkeypatch, dtype):
    model = load_model(folder)
    on_the_host = weights_fingerprint(model, jnp.dtype(dtype))
    monkeypatch.setattr(fingerprints, "SMALL", 0)
    assert weights_fingerprint(model, jnp.dtype(dtype)) == on_the_host


def test_every_element_and_its_place_count(folder):
    model = load_model(folder)
    before = weights_fingerprint(model)
    weight = model.language.wte
    first, second = weight[0, 0], weight[0, 1]
    weight[...] = weight[...].at[0, :2].set(jnp.array([second, first]))
    swapped = weights_fingerprint(model)
    weight[...] = weight[...].at[0, :2].set(jnp.array([first, second]))
    assert weights_fingerprint(model) == before
    weight[...] = weight[...].at[-1, -1].add(1e-6)
    assert len({before, swapped, weights_fingerprint(model)}) == 3


def test_weights_count_without_the_adapter_and_as_they_are_computed_with(folder):
    model = load_model(folder)
    assert weights_fingerprint(adapted(folder)) == weights_fingerprint(model)
    assert weights_fingerprint(model, jnp.bfloat16) == weights_fingerprint(load_model(folder, dtype="bfloat16"))
    assert weights_fingerprint(model, jnp.bfloat16) != weights_fingerprint(model)


def test_an_adapter_is_its_factors_and_its_scale(folder):
    model = adapted(folder)
    first = adapter_fingerprint(model)
    for _, linear in linears(model.language.layers):
        if linear.lora_b is not None:
            linear.lora_b[...] = linear.lora_b[...].at[0, 0, 0].set(1.0)
    others = [adapter_fingerprint(m) for m in (model, adapted(folder, alpha=2.0), adapted(folder, seed=1))]
    assert len({first, *others}) == 4
    assert adapter_fingerprint(load_model(folder)) is None
