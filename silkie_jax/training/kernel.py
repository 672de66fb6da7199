"""Which attention kernel a run uses: the one its configuration names, on its mesh, if it is sound on this machine."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from silkie_jax.errors import UserError
from silkie_jax.qwen_vl.attention import PADDING, PLAIN, Kernel
from silkie_jax.training.mesh import BATCH, RULES

# What `attention: auto` means. Elsewhere (the CPU) XLA's own fusions are as good and the kernel would be interpreted.
AUTO = {"tpu": "flash", "gpu": "flash"}


def attention_kernel(name: str, dtype: str, mesh: Mesh) -> Kernel:
    """The kernel that a configuration's `attention` names, for arrays that lie on `mesh`.

    Raises:
      UserError: the platform has no such kernel.
    """
    platform = _platform(mesh)
    name = AUTO.get(platform, "plain") if name == "auto" else name
    if name == "cudnn" and (platform != "gpu" or dtype != "bfloat16"):
        raise UserError(f"attention: cudnn is for bfloat16 on NVIDIA GPUs, and this is {dtype} on {platform}; use auto")
    interpreted = platform if platform in AUTO else "interpret"
    return Kernel(name, interpreted, mesh, BATCH, RULES["heads"])


def sound_kernel(name: str, dtype: str, mesh: Mesh, say: Callable[[str], None] = print) -> Kernel:
    """`attention_kernel`, if it agrees with the plain path on this machine.

    A kernel that `auto` chose and that does not compile or does not agree is replaced by the plain path, with a line
    that says so: a driver or a chip that nobody has tried costs speed and not the run.

    Raises:
      UserError: the kernel was asked for by name and is not sound here.
    """
    kernel = attention_kernel(name, dtype, mesh)
    if kernel.name == "plain" or kernel.platform == "interpret":
        return kernel
    wrong = _what_is_wrong(kernel, jnp.dtype(dtype))
    if not wrong:
        return kernel
    if name != "auto":
        raise UserError(f"attention: {name} is not sound on this machine: {wrong}; use attention=plain")
    say(f"attention: plain, as {kernel.name} is not sound on this machine: {wrong}")
    return dataclasses.replace(kernel, name="plain")


def _platform(mesh: Mesh) -> str:
    platform = mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def _what_is_wrong(kernel: Kernel, dtype: jnp.dtype) -> str | None:
    """Compares a kernel's values and gradients with the plain path on one small row of branches."""
    random = np.random.default_rng(0)
    branches = jnp.asarray([[0] * 96 + [1] * 90 + [2] * 40 + [PADDING] * 30])
    q, k, v, weight = (jnp.asarray(random.standard_normal((1, 256, 2, 128)), dtype) for _ in range(4))
    weight = weight * (branches != PADDING)[..., None, None]

    def values(kernel: Kernel) -> list[np.ndarray]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = kernel.among(branches)(q, k, v) * weight
            return out.sum(dtype=jnp.float32), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return [np.asarray(x, np.float64) for x in (out, *gradients)]

    try:
        found, expected = values(dataclasses.replace(kernel, mesh=None)), values(PLAIN)
    except Exception as e:  # whatever a compiler or a driver says
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}"
    allowed = 64 * float(jnp.finfo(dtype).eps)
    apart = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) for a, b in zip(found, expected, strict=True))
    return None if apart < allowed else f"its values are {apart:.1e} apart from the plain ones"
