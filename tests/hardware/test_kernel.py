"""The choice of an attention kernel, and that a training step gives the same with each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from silkie_jax.errors import UserError
from silkie_jax.hardware import kernel as module
from silkie_jax.hardware.kernel import attention_kernel, sound_kernel
from silkie_jax.hardware.mesh import make_mesh
from silkie_jax.nn.attention import Kernel, attention


def test_auto_is_plain_on_a_cpu():
    assert attention_kernel("auto", "bfloat16", make_mesh(devices=jax.devices()[:1])).name == "plain"


def test_cudnn_is_refused_elsewhere():
    with pytest.raises(UserError, match="cudnn is for bfloat16 on NVIDIA GPUs, and this is bfloat16 on cpu"):
        attention_kernel("cudnn", "bfloat16", make_mesh(devices=jax.devices()[:1]))


@pytest.fixture
def gpu(monkeypatch):
    """A machine that claims to be a GPU: a dictionary from a kernel's name to what it makes of the plain outcome."""
    outcomes: dict[str, object] = {}
    real = Kernel.among

    def pretend(self, attend):
        change = outcomes.get(self.name, lambda out: out)
        return lambda q, k, v: change(attend(q, k, v))

    monkeypatch.setattr(module, "platform_of", lambda mesh: "gpu")
    monkeypatch.setattr(module, "_largest_blocks", lambda mesh: None)
    monkeypatch.setattr(module, "find_spec", lambda name: None)  # tokamax, an extra
    monkeypatch.setattr(Kernel, "among", lambda self, branches: pretend(self, real(Kernel(), branches)))
    monkeypatch.setattr(Kernel, "everywhere", lambda self, q, k, v: pretend(self, attention)(q, k, v))
    return outcomes


def fails(out):
    raise RuntimeError("no such instruction\nand more")


def test_auto_takes_the_fastest_of_the_sound_ones(gpu, monkeypatch, capsys):
    times = {"flash": 2.0, "cudnn": 1.0}
    clock = iter(np.cumsum([0, *(x for n in ("flash", "cudnn") for _ in range(6) for x in (times[n], 0.0))]).tolist())
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(module, "_run", small(module._run))
    assert sound_kernel("auto", "bfloat16", None).name == "cudnn"
    assert capsys.readouterr().out == "attention: cudnn (flash 2000.00 ms, cudnn 1000.00 ms a layer of four rows)\n"


def test_tokamax_is_a_third_candidate_where_it_is_installed(gpu, monkeypatch, capsys):
    monkeypatch.setattr(module, "_run", small(module._run))
    assert sound_kernel("auto", "bfloat16", None, before="tokamax").name in ("flash", "cudnn")
    assert "tokamax" not in capsys.readouterr().out
    with pytest.raises(
        UserError, match="tokamax is not sound on this machine: it is not installed; the extra `tokamax`"
    ):
        sound_kernel("tokamax", "bfloat16", None)
    monkeypatch.setattr(module, "find_spec", lambda name: "there")
    assert sound_kernel("auto", "bfloat16", None, before="tokamax").name == "tokamax"
    gpu["tokamax"] = lambda out: 1.1 * out
    assert sound_kernel("auto", "bfloat16", None, before="tokamax").name != "tokamax"
    assert "attention: tokamax is not sound on this machine and is left out" in capsys.readouterr().out


@pytest.mark.parametrize("mesh", [None, (2, 1, 2)])
def test_what_tokamax_takes_for_the_truth_is_the_plain_path(mesh):
    """On the CPU its kernel is not to be had; the mask, the padding and the mesh are the same."""
    pytest.importorskip("tokamax", reason="tokamax is not installed (an extra, for Python 3.12 or later)")
    branches = jnp.asarray([[0] * 20 + [1] * 20 + [2] * 20 + [-1] * 4, [0] * 40 + [1] * 24])
    q, k, v = (jnp.asarray(np.random.default_rng(n).standard_normal((2, 64, 2, 16)), jnp.float32) for n in range(3))
    over = None if mesh is None else make_mesh(*mesh, devices=jax.devices()[:4])
    kernel = Kernel("tokamax", "interpret", over, ("data", "fsdp"), "tensor")
    seen = (branches >= 0)[..., None, None]

    def values(kernel):
        def loss(q, k, v):
            out = jnp.where(seen, kernel.among(branches)(q, k, v), 0)
            return (out**2).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return [out, *gradients, kernel.everywhere(q, k, v)]

    for ours, theirs in zip(values(kernel), values(Kernel()), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def small(run):
    return lambda kernel, rows, length, heads, width, masked, dtype: run(kernel, 1, 64, 1, 16, masked, dtype)


def test_a_run_goes_on_with_the_kernel_that_it_began_with(gpu):
    assert sound_kernel("auto", "bfloat16", None, before="cudnn").name == "cudnn"
    assert sound_kernel("auto", "bfloat16", None, before="plain").name == "plain"
    assert sound_kernel("flash", "bfloat16", None, before="cudnn").name == "flash"


def test_float32_has_no_cudnn(gpu):
    assert sound_kernel("auto", "float32", None).name == "flash"


def test_a_kernel_that_fails_or_disagrees_costs_speed_and_not_the_run(gpu, capsys):
    gpu["flash"] = fails
    assert sound_kernel("auto", "float32", None).name == "plain"
    said = "attention: flash is not sound on this machine and is left out: RuntimeError: no such instruction\n"
    assert capsys.readouterr().out == said
    gpu["flash"] = lambda out: 1.01 * out
    assert sound_kernel("auto", "float32", None).name == "plain"
    assert "apart from the plain ones" in capsys.readouterr().out
    gpu["flash"] = lambda out: 1.1 * out
    assert sound_kernel("auto", "bfloat16", None, before="flash").name == "cudnn"
    with pytest.raises(UserError, match=r"attention: flash is not sound on this machine: .* use attention=plain"):
        sound_kernel("flash", "float32", None)


def test_gradients_that_are_no_numbers_are_noticed(gpu, capsys):
    """Its values are right; each comparison with NaN is false, which must not pass for agreement."""

    @jax.custom_vjp
    def broken(out):
        return out

    broken.defvjp(lambda out: (out, None), lambda _, gradient: (jnp.nan * gradient,))
    gpu["flash"] = broken
    assert sound_kernel("auto", "float32", None).name == "plain"
    assert "nan apart" in capsys.readouterr().out


def silent(out):
    raise NotImplementedError


def test_an_error_without_a_message_costs_speed_and_not_the_run(gpu, capsys):
    gpu["flash"] = silent
    assert sound_kernel("auto", "float32", None).name == "plain"
    assert "NotImplementedError: no message" in capsys.readouterr().out


def test_a_kernel_that_fails_on_images_alone_is_noticed(gpu, capsys):
    gpu["flash"] = lambda out: out if out.shape[-1] == 128 else 2 * out
    assert sound_kernel("auto", "float32", None).name == "plain"


@pytest.fixture
def other_host(monkeypatch):
    """What another host finds sound, and what it dies of."""
    other = {"sound": [True, True, True], "dies": ""}

    def gather(own):
        if own.dtype == bool:
            return np.stack([own, np.array(other["sound"][: len(own)])])
        return np.stack([own, np.frombuffer(other["dies"].encode().ljust(len(own), b"\0"), np.uint8)])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda number: number)
    return other


def test_hosts_take_what_is_sound_on_all_of_them(gpu, other_host):
    """Another host says that flash is not sound there; the first host's choice is everybody's."""
    other_host["sound"] = [False, True, True]
    assert sound_kernel("auto", "bfloat16", None).name == "cudnn"


def test_a_kernel_asked_for_by_name_that_another_host_refuses_is_refused_on_all(gpu, other_host):
    other_host["dies"] = "attention: flash is not sound on this machine: no driver; use attention=plain"
    with pytest.raises(UserError, match=r"host 1 stopped: attention: flash is not sound .* use attention=plain"):
        sound_kernel("flash", "float32", None)


def test_heads_and_rows_are_split_over_a_mesh():
    """Eight pretended devices: the kernel runs on each device's own rows and heads, and nothing is gathered for it."""
    mesh = make_mesh(2, 2, 2)
    split = attention_kernel("flash", "float32", mesh)
    branches = jnp.asarray([[0] * 20 + [1] * 12 + [2] * 8] * 4)
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((4, 40, 4, 16)), jnp.float32) for _ in range(3))
    part = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor"))
    compiled = jax.jit(split.among(branches)).lower(*(jax.device_put(x, part) for x in (q, k, v))).compile()
    assert "all-gather" not in compiled.as_text()
    ours = compiled(*(jax.device_put(x, part) for x in (q, k, v)))
    assert ours.sharding.is_equivalent_to(part, 4)
    np.testing.assert_allclose(ours, Kernel().among(branches)(q, k, v), rtol=0, atol=1e-5)
