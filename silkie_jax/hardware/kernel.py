"""Which attention kernel a run uses: the one its configuration names, or the best that is sound on this machine."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from silkie_jax.errors import UserError
from silkie_jax.hardware.distributed import as_the_first_host, on_all_hosts, together
from silkie_jax.hardware.mesh import BATCH, RULES, platform_of
from silkie_jax.nn.attention import PADDING, PLAIN, Kernel
from silkie_jax.nn.flash import FLASH
from silkie_jax.nn.kept import Keeper

# What `attention: auto` may mean, the first before anything is measured. Elsewhere, on the CPU, XLA's own fusions are
# as good, and the one-pass kernel would be interpreted.
CANDIDATES = {"tpu": ("flash",), "gpu": ("flash", "cudnn", "tokamax")}
_NVIDIA = ("cudnn", "tokamax")  # for bfloat16 alone
_ABSENT = "it is not installed; the extra `tokamax` brings it, on Python 3.12 or later"
# Workstation GPUs (Ampere, Ada, Blackwell), whose blocks can have 99 KiB of shared memory: the gradient of keys takes
# 114 with the blocks of data centre GPUs, by XLA's compiler.
_SMALL, _SMALL_BLOCKS = ("8.6", "8.9", "12.0", "12.1"), (64, 64)


def attention_kernel(name: str, dtype: str, mesh: Mesh) -> Kernel:
    """The kernel that a configuration's `attention` names, for arrays that lie on `mesh`.

    Raises:
      UserError: the platform has no such kernel.
    """
    platform = platform_of(mesh)
    name = CANDIDATES.get(platform, ("plain",))[0] if name == "auto" else name
    if name in _NVIDIA and (platform != "gpu" or dtype != "bfloat16"):
        raise UserError(
            f"attention: {name} is for bfloat16 on NVIDIA GPUs, and this is {dtype} on {platform}; use auto"
        )
    where = platform if platform in CANDIDATES else "interpret"
    return Kernel(name, where, mesh, BATCH, RULES["heads"], _largest_blocks(mesh))


def _largest_blocks(mesh: Mesh) -> tuple[int, int] | None:
    """The largest blocks of `flash` that a small GPU has room for; None: any."""
    return _SMALL_BLOCKS if getattr(mesh.devices.flat[0], "compute_capability", None) in _SMALL else None


def sound_kernel(
    name: str, dtype: str, mesh: Mesh, before: str | None = None, say: Callable[[str], None] = print
) -> Kernel:
    """`attention_kernel`, if it agrees with the plain path on this machine; `auto` is the fastest one that does.

    Where none does, `auto` is the plain path, and a line says why: a driver or a chip that nobody has tried costs speed
    and not the run. `before` is what an earlier part of this run took: it is taken again, whatever is faster now.

    Raises:
      UserError: the kernel was asked for by name and is not sound here.
    """
    platform = platform_of(mesh)
    if platform not in CANDIDATES or name == "plain":
        return attention_kernel(name, dtype, mesh)
    names = CANDIDATES[platform] if name == "auto" else (name,)
    kernels = [attention_kernel(n, dtype, mesh) for n in names if n not in _NVIDIA or name == n or dtype == "bfloat16"]
    wrong = [_what_is_wrong(kernel, jnp.dtype(dtype)) for kernel in kernels]
    with together():
        for kernel, why in zip(kernels, wrong, strict=True):
            if why and name != "auto":
                raise UserError(f"attention: {name} is not sound on this machine: {why}; use attention=plain")
            if why and why != _ABSENT:
                say(f"attention: {kernel.name} is not sound on this machine and is left out: {why}")
    # All hosts must take the same one: what is sound on each of them, and of these what the first one chooses.
    sound = on_all_hosts([not why for why in wrong])
    choices = [kernel for kernel, ok in zip(kernels, sound, strict=True) if ok]
    with together():
        if not choices or before == "plain":
            best = -1
        elif before in (known := [kernel.name for kernel in choices]):
            best = known.index(before)
        else:
            best = _fastest(choices, jnp.dtype(dtype), say) if len(choices) > 1 else 0
    best = as_the_first_host(best)
    return choices[best] if best >= 0 else attention_kernel("plain", dtype, mesh)


def sound_keeper(dtype: str, mesh: Mesh, say: Callable[[str], None] = print) -> Keeper:
    """How keys and values are kept for generation: for cuDNN on NVIDIA GPUs in bfloat16, where it is sound, else plain.

    On an H200 a decoding step took 9.1 ms with it and 10.6 ms without (32 slots, 900 of 1,024 places).
    """
    plain = Keeper(attention_kernel("plain", dtype, mesh))
    if platform_of(mesh) != "gpu" or dtype != "bfloat16":
        return plain
    keeper = Keeper(attention_kernel("cudnn", dtype, mesh))
    why = _what_is_wrong_with(keeper)
    if why:
        say(f"attention: cudnn is not sound for decoding on this machine and is left out: {why}")
    return keeper if on_all_hosts([not why])[0] else plain


def _what_is_wrong_with(keeper: Keeper) -> str | None:
    """Compares attention to what is kept with the plain path."""
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((4, t, 2, 128)), jnp.bfloat16) for t in (1, 256, 256))
    places, slots = jnp.asarray([0, 17, 128, 255]), jnp.arange(4)

    def values(keeper: Keeper) -> np.ndarray:
        @jax.jit
        def run() -> jax.Array:
            kept = keeper.keep_prompts(keeper.empty(4, 256, 2, 128, q.dtype), k, v, slots)
            return keeper.attend(q, kept, places)

        return np.asarray(run(), np.float64)

    try:
        alone = Keeper(dataclasses.replace(keeper.kernel, mesh=None))
        return _apart([(values(alone), values(Keeper()))], q.dtype)
    except Exception as e:  # whatever a compiler or a driver says
        return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0][:200]}"


def _apart(pairs: Iterable[tuple[np.ndarray, np.ndarray]], dtype: jnp.dtype) -> str | None:
    """What to say of values that are too far from the plain ones."""
    # NumPy's maximum passes NaN on, which Python's may drop.
    apart = float(np.max([0.0, *(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6) for a, b in pairs)]))
    allowed = {2: 4, 4: 64}[dtype.itemsize] * float(jnp.finfo(dtype).eps)  # of the largest: 3% in bfloat16
    return None if apart < allowed else f"its values are {apart:.1e} apart from the plain ones"


def _run(
    kernel: Kernel, rows: int, length: int, heads: int, width: int, masked: bool, dtype: jnp.dtype
) -> tuple[Callable, tuple]:
    """A compiled (values, gradients) of a kernel alone on one device, and its arguments.

    Rows have a prompt, two branches and padding. The forward pass is that of `remat: dots`.
    """
    random = np.random.default_rng(0)
    ends = np.arange(length) * 8 // length  # eighths: three of the prompt, three and one of branches, one of padding
    row = np.select([ends < 3, ends < 6, ends < 7], [0, 1, 2], PADDING)
    branches = jnp.asarray(np.tile(row, (rows, 1)))
    q, k, v, weight = (jnp.asarray(random.standard_normal((rows, length, heads, width)), dtype) for _ in range(4))
    alone = dataclasses.replace(kernel, mesh=None)
    if masked:
        weight = weight * (branches != PADDING)[..., None, None]
    attend = alone.among(branches) if masked else alone.everywhere
    attend = jax.checkpoint(attend, policy=jax.checkpoint_policies.save_only_these_names(FLASH))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(q, k, v) * weight
        return out.sum(dtype=jnp.float32), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)), (q, k, v)


def _what_is_wrong(kernel: Kernel, dtype: jnp.dtype) -> str | None:
    """Compares a kernel's values and gradients with those of the plain path, on short and usual rows and on images."""

    def values(kernel: Kernel, length: int, heads: int, width: int, masked: bool) -> list[np.ndarray]:
        run, arguments = _run(kernel, 1, length, heads, width, masked, dtype)
        (_, out), gradients = run(*arguments)
        return [np.asarray(x, np.float64) for x in (out, *gradients)]

    if kernel.name == "tokamax" and find_spec("tokamax") is None:
        return _ABSENT
    both: list[tuple[np.ndarray, np.ndarray]] = []
    try:
        for case in _CASES:
            both += zip(values(kernel, *case), values(PLAIN, *case), strict=True)
    except Exception as e:  # whatever a compiler or a driver says
        return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0][:200]}"
    return _apart(both, dtype)


# Length, heads, their width, and whether it is a row (masked) or an image: the decoder's and the tower's.
_CASES = ((256, 2, 128, True), (1024, 1, 128, True), (1024, 1, 104, False))


def _fastest(kernels: list[Kernel], dtype: jnp.dtype, say: Callable[[str], None]) -> int:
    """Which of the kernels is the fastest on four rows of the usual length."""
    times = []
    for kernel in kernels:
        run, arguments = _run(kernel, 4, 1024, 32, 128, True, dtype)
        each = []
        for _ in range(6):
            began = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            each.append(1e3 * (time.perf_counter() - began))
        times.append(statistics.median(each[1:]))
    best = int(np.argmin(times))
    measured = ", ".join(f"{kernel.name} {ms:.2f} ms" for kernel, ms in zip(kernels, times, strict=True))
    say(f"attention: {kernels[best].name} ({measured} a layer of four rows)")
    return best
