"""Eight devices against one, for every shape of the mesh."""

import dataclasses
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from silkie_jax.checkpoints.peft import save_adapter
from silkie_jax.checkpoints.weights import load_model
from silkie_jax.errors import UserError
from silkie_jax.hardware.kernel import attention_kernel
from silkie_jax.hardware.mesh import batch_sharding, batch_shards, make_mesh, sharding_of
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.nn.attention import PLAIN
from silkie_jax.nn.lora import add_lora, linears
from silkie_jax.preference.losses import LossOptions
from silkie_jax.training.step import Objective
from tests.training.support import Steps, assert_same_arrays, make_tiny, record, record_row, rows_arrays

SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(shape) == 8]
OBJECTIVE = Objective("sigmoid", LossOptions(0.02), "copy", remat="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """An adapter whose two factors are both at work."""
    model = load_model(folder)
    add_lora(model, 8, 16, ["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"], rngs=nnx.Rngs(0))
    for number, (_, linear) in enumerate(linears(model.language.layers)):
        linear.lora_b[...] = 0.02 * jax.random.normal(jax.random.key(number), linear.lora_b.shape)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(model, folder, base_model="tiny")
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    """Five rows, which none of the meshes divides, and what fills them up to eight."""
    tokenizer = Tokenizer.from_folder(folder)
    made = [record(0, (2, 1)), record(1, (1, 2)), record(2, images=0), record(3, (3, 2, 1)), record(4, (2, 1))]
    return rows_arrays(tokenizer, [*(record_row(tokenizer, r) for r in made), None, None, None])


def outcome(folder, adapter, rows, mesh=None, kernel=PLAIN, objective=OBJECTIVE):
    """Metrics and the gradient of every weight, those of the adapter included."""
    where = None if mesh is None else partial(sharding_of, mesh)
    policy = load_model(folder, adapter=adapter, sharding_of=where)
    reference = load_model(folder, adapter=adapter, sharding_of=where)
    reference.language.lm_head.weight[...] *= 1.01
    return Steps(policy, objective, reference=reference, mesh=mesh, kernel=kernel)(rows)


@pytest.fixture(scope="module")
def one_device(folder, adapter, rows):
    return outcome(folder, adapter, rows)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_every_mesh_gives_the_loss_and_the_gradients_of_one_device(folder, adapter, rows, one_device, shape):
    mesh = make_mesh(*shape)
    metrics, gradients = outcome(folder, adapter, rows, mesh)
    expected, expected_gradients = one_device
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)  # margins are small differences
    assert any("lora_a" in name for name in gradients)
    assert any(name.startswith("visual.") for name in gradients)
    assert_same_arrays(gradients, expected_gradients, 1e-5)


@pytest.mark.slow
def test_the_one_pass_kernel_on_a_mesh_gives_the_loss_and_the_gradients_of_one_device(
    folder, adapter, rows, one_device
):
    """With `dots`, which keeps what the kernel's gradient needs."""
    mesh = make_mesh(2, 2, 2)
    objective = dataclasses.replace(OBJECTIVE, remat="dots")
    kernel = attention_kernel("flash", "float32", mesh)
    metrics, gradients = outcome(folder, adapter, rows, mesh, kernel, objective)
    expected, expected_gradients = one_device
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert_same_arrays(gradients, expected_gradients, 1e-5)


def test_all_shapes_are_there():
    assert len(SHAPES) == 10


# The mesh and its table


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 1, -1), (1, 1, 8)),
        ((2, 2, 2), (2, 2, 2)),
        ((1, 1, 1), (1, 1, 1)),
        ((2, 1, 2), (2, 1, 2)),
    ],
)
def test_sizes_of_the_mesh(sizes, shape):
    mesh = make_mesh(*sizes)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert batch_shards(mesh) == shape[0] * shape[1]


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (16, 1, 1), (2, 4, 2)])
def test_a_mesh_that_does_not_divide_the_devices_is_refused(sizes):
    with pytest.raises(UserError, match=r"^mesh data .* does not divide the 8 devices"):
        make_mesh(*sizes)


def test_what_an_axis_does_not_divide_is_kept_whole():
    mesh = make_mesh(1, 2, 4)
    assert sharding_of(mesh, ("layers", "heads", "embed"), (3, 8, 6)).spec == PartitionSpec(None, "tensor", "fsdp")
    assert sharding_of(mesh, ("layers", "heads", "embed"), (3, 6, 5)).spec == PartitionSpec(None, None, None)


def test_weights_are_spread_over_fsdp_and_tensor(folder, adapter):
    mesh = make_mesh(1, 4, 2)
    model = load_model(folder, adapter=adapter, sharding_of=partial(sharding_of, mesh))
    arrays = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    held = {name: math.prod(x.addressable_shards[0].data.shape) / x.size for name, x in arrays.items()}
    assert held["language.layers.mlp.w1.weight"] == held["language.wte"] == 1 / 8
    assert held["language.layers.attn.c_attn.lora_a"] == 1 / 4
    assert held["language.layers.attn.c_attn.lora_b"] == 1 / 8
    total = sum(x.size for x in arrays.values())
    assert sum(held[name] * x.size for name, x in arrays.items()) < 0.2 * total


def test_rows_are_split_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    batch = jax.device_put(jnp.zeros((3, 8, 5)), batch_sharding(mesh, leading=1))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(3, 2, 5)}
    assert len(np.unique([shard.index[1].start or 0 for shard in batch.addressable_shards])) == 4
