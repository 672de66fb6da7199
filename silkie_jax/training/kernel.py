"""Which attention kernel a run uses: the one its configuration names, or the best that is sound on this machine."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from silkie_jax.errors import UserError
from silkie_jax.qwen_vl.attention import PADDING, PLAIN, Kernel
from silkie_jax.training.mesh import BATCH, RULES

# What `attention: auto` may mean, the first before anything is measured. Elsewhere, on the CPU, XLA's own fusions are
# as good, and the one-pass kernel would be interpreted.
CANDIDATES = {"tpu": ("flash",), "gpu": ("flash", "cudnn")}


def attention_kernel(name: str, dtype: str, mesh: Mesh) -> Kernel:
    """The kernel that a configuration's `attention` names, for arrays that lie on `mesh`.

    Raises:
      UserError: the platform has no such kernel.
    """
    platform = _platform(mesh)
    name = CANDIDATES.get(platform, ("plain",))[0] if name == "auto" else name
    if name == "cudnn" and (platform != "gpu" or dtype != "bfloat16"):
        raise UserError(f"attention: cudnn is for bfloat16 on NVIDIA GPUs, and this is {dtype} on {platform}; use auto")
    return Kernel(name, platform if platform in CANDIDATES else "interpret", mesh, BATCH, RULES["heads"])


def sound_kernel(
    name: str, dtype: str, mesh: Mesh, before: str | None = None, say: Callable[[str], None] = print
) -> Kernel:
    """`attention_kernel`, if it agrees with the plain path on this machine; `auto` is the fastest one that does.

    Where none does, `auto` is the plain path, and a line says why: a driver or a chip that nobody has tried costs speed
    and not the run. `before` is what an earlier part of this run took: it is taken again, whatever is faster now.

    Raises:
      UserError: the kernel was asked for by name and is not sound here.
    """
    platform = _platform(mesh)
    if platform not in CANDIDATES or name == "plain":
        return attention_kernel(name, dtype, mesh)
    names = CANDIDATES[platform] if name == "auto" else (name,)
    if name == "auto" and before in (*names, "plain"):
        names = (before,)
    kernels = [attention_kernel(n, dtype, mesh) for n in names if n != "cudnn" or name == n or dtype == "bfloat16"]
    sound = []
    for kernel in kernels:
        wrong = None if kernel.name == "plain" else _what_is_wrong(kernel, jnp.dtype(dtype))
        if not wrong:
            sound.append(kernel)
        elif name != "auto":
            raise UserError(f"attention: {name} is not sound on this machine: {wrong}; use attention=plain")
        else:
            say(f"attention: {kernel.name} is not sound on this machine and is left out: {wrong}")
    if not sound:
        return attention_kernel("plain", dtype, mesh)
    return sound[_fastest(sound, jnp.dtype(dtype), say)] if len(sound) > 1 else sound[0]


def _platform(mesh: Mesh) -> str:
    platform = mesh.devices.flat[0].platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def _outcome(kernel: Kernel, rows: int, length: int, heads: int, dtype: jnp.dtype) -> tuple[Callable, tuple]:
    """A compiled (values, gradients) of a kernel alone on one device, and its arguments: rows of two branches."""
    random = np.random.default_rng(0)
    parts = np.array([[0] * (length * 3 // 8) + [1] * (length * 3 // 8)])
    parts = np.tile(np.pad(parts, ((0, 0), (0, length // 8)), constant_values=2), (rows, 1))
    branches = jnp.asarray(np.pad(parts, ((0, 0), (0, length - parts.shape[1])), constant_values=PADDING))
    q, k, v, weight = (jnp.asarray(random.standard_normal((rows, length, heads, 128)), dtype) for _ in range(4))
    weight = weight * (branches != PADDING)[..., None, None]
    attend = dataclasses.replace(kernel, mesh=None).among(branches)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v) * weight
        return out.sum(dtype=jnp.float32), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)), (q, k, v)


def _what_is_wrong(kernel: Kernel, dtype: jnp.dtype) -> str | None:
    """Compares a kernel's values and gradients with those of the plain path on one small row."""

    def values(kernel: Kernel) -> list[np.ndarray]:
        run, arguments = _outcome(kernel, 1, 256, 2, dtype)
        (_, out), gradients = run(*arguments)
        return [np.asarray(x, np.float64) for x in (out, *gradients)]

    try:
        found, expected = values(kernel), values(PLAIN)
    except Exception as e:  # whatever a compiler or a driver says
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}"
    allowed = {2: 4, 4: 64}[dtype.itemsize] * float(jnp.finfo(dtype).eps)  # of the largest: 3% in bfloat16
    apart = max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) for a, b in zip(found, expected, strict=True))
    return None if apart < allowed else f"its values are {apart:.1e} apart from the plain ones"


def _fastest(kernels: list[Kernel], dtype: jnp.dtype, say: Callable[[str], None]) -> int:
    """Which of the kernels is the fastest on rows of the usual length; the first host decides for all."""
    times = []
    for kernel in kernels:
        run, arguments = _outcome(kernel, 4, 1024, 32, dtype)
        each = []
        for _ in range(6):
            began = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            each.append(1e3 * (time.perf_counter() - began))
        times.append(statistics.median(each[1:]))
    best = int(np.argmin(times))
    if jax.process_count() > 1:
        best = int(multihost_utils.broadcast_one_to_all(jnp.int32(best)))
    measured = ", ".join(f"{kernel.name} {ms:.2f} ms" for kernel, ms in zip(kernels, times, strict=True))
    say(f"attention: {kernels[best].name} ({measured} a layer of four rows)")
    return best
