"""The choice of an attention kernel, and that a training step gives the same with each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from silkie_jax.errors import UserError
from silkie_jax.qwen_vl import attention
from silkie_jax.qwen_vl.attention import Kernel
from silkie_jax.training import kernel as module
from silkie_jax.training.kernel import attention_kernel, sound_kernel
from silkie_jax.training.mesh import make_mesh


def test_auto_is_plain_on_a_cpu():
    assert attention_kernel("auto", "bfloat16", make_mesh(devices=jax.devices()[:1])).name == "plain"


def test_cudnn_is_refused_elsewhere():
    with pytest.raises(UserError, match="cudnn is for bfloat16 on NVIDIA GPUs, and this is bfloat16 on cpu"):
        attention_kernel("cudnn", "bfloat16", make_mesh(devices=jax.devices()[:1]))


@pytest.fixture
def claimed(monkeypatch):
    """A machine that claims to be a GPU; its kernel is what a test says it is."""

    def claim(outcome):
        chosen = Kernel("flash", "gpu")
        monkeypatch.setattr(module, "attention_kernel", lambda name, dtype, mesh: chosen)
        monkeypatch.setattr(attention.Kernel, "_flash", outcome)

    return claim


def test_a_kernel_that_agrees_is_taken(claimed):
    claimed(lambda self, q, k, v, branches: Kernel().among(branches)(q, k, v))
    assert sound_kernel("auto", "float32", None).name == "flash"


def test_a_kernel_that_fails_or_disagrees_costs_speed_and_not_the_run(claimed, capsys):
    def fails(self, q, k, v, branches):
        raise RuntimeError("no such instruction\nand more")

    claimed(fails)
    assert sound_kernel("auto", "float32", None).name == "plain"
    said = "attention: plain, as flash is not sound on this machine: RuntimeError: no such instruction\n"
    assert capsys.readouterr().out == said

    claimed(lambda self, q, k, v, branches: 1.01 * Kernel().among(branches)(q, k, v))
    assert sound_kernel("auto", "float32", None).name == "plain"
    assert "apart from the plain ones" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"attention: flash is not sound on this machine: .* use attention=plain"):
        sound_kernel("flash", "float32", None)


def test_heads_and_rows_are_split_over_a_mesh():
    """Eight pretended devices: the kernel runs on each device's own rows and heads, and nothing is gathered for it."""
    mesh = make_mesh(2, 2, 2)
    split = dataclasses.replace(attention_kernel("flash", "float32", mesh))
    branches = jnp.asarray([[0] * 20 + [1] * 12 + [2] * 8] * 4)
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((4, 40, 4, 16)), jnp.float32) for _ in range(3))
    part = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor"))
    compiled = jax.jit(split.among(branches)).lower(*(jax.device_put(x, part) for x in (q, k, v))).compile()
    assert "all-gather" not in compiled.as_text()
    ours = compiled(*(jax.device_put(x, part) for x in (q, k, v)))
    assert ours.sharding.is_equivalent_to(part, 4)
    np.testing.assert_allclose(ours, Kernel().among(branches)(q, k, v), rtol=0, atol=1e-5)
