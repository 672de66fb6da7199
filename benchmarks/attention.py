"""The attention kernels: time and memory of each against the plain path, forward and with gradients.

    python -m benchmarks.attention [--lengths 1024 2048 4096] [--rows 4] [--steps 20] [--out results]
    python -m benchmarks.attention --topology v5e:2x2        (or h100:1: compiled for a machine that is not there)

Rows are prompts of a third of the tokens and four branches; heads are Qwen-VL's, 32 of 128, in bfloat16. `vision` is
the tower's: images of 1,024 patches, 16 heads of 104, no mask. `apart` is the largest difference of values and
gradients to the plain path's, relative to the largest of these. With `--topology` nothing runs: memory and compile time
only. On a CPU the one-pass kernel would be interpreted, so that there only the plain path is measured.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.common import keep
from silkie_jax.errors import UserError
from silkie_jax.hardware.topologies import find_devices, prepare

HEADS, WIDTH = 32, 128
VISION_HEADS, VISION_WIDTH, PATCHES = 16, 104, 1024
KERNELS = ("plain", "flash", "cudnn", "tokamax")


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", default="full", help="other sizes are for trying this script, with one head")
    parser.add_argument("--topology", help="compile for it instead of running here")
    parser.add_argument("--out", help="a file, or `results` for benchmarks/results")
    args = parser.parse_args()
    if args.topology:
        prepare(args.topology)
    import jax

    devices = find_devices(args.topology) if args.topology else jax.devices()
    how = "compiled only" if args.topology else "times in ms"
    title = "attention" + (f"-{args.topology.replace(':', '-')}" if args.topology else "")
    lines = [
        f"{args.rows} rows (or images) on {devices[0].device_kind}; {how}",
        "",
        "| case | kernel | forward | x plain | with gradients | x plain | temporaries, MiB | x plain | compile, s "
        "| apart |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cases = [(f"rows of {length} tokens", length, HEADS, WIDTH, True) for length in args.lengths]
    for name, length, heads, width, masked in [*cases, ("vision", PATCHES, VISION_HEADS, VISION_WIDTH, False)]:
        heads = heads if args.size == "full" else 1
        found = {kernel: measure(kernel, devices[0], args, length, heads, width, masked) for kernel in KERNELS}
        plain = found["plain"]
        for kernel, now in found.items():
            if isinstance(now, str):
                lines.append(f"| {name} | {kernel} | {now} | | | | | | | |")
                continue
            # No ratio to what cannot be done.
            base = (0.0, 0.0, 0.0) if isinstance(plain, str) else (plain.forward, plain.backward, plain.temporaries)
            each = (now.forward, now.backward, now.temporaries)
            ratios = [f"{a / b:.2f}" if b else "" for a, b in zip(each, base, strict=True)]
            cells = [f"{value:.2f} | {ratio}" for value, ratio in zip(each[:2], ratios[:2], strict=True)]
            shown = " | ".join(cells) if not args.topology else " | | | "
            apart = "" if isinstance(plain, str) or args.topology else f"{difference(now.values, plain.values):.1e}"
            memory = f"{now.temporaries:.0f} | {ratios[2]}"
            lines.append(f"| {name} | {kernel} | {shown} | {memory} | {now.compiling:.1f} | {apart} |")
        print("\n".join(lines[-len(KERNELS) :]), flush=True)
        keep(title, "\n".join(lines), args.out, finished=False)
    keep(title, "\n".join(lines), args.out)


@dataclasses.dataclass
class Measured:
    """Of one kernel: milliseconds forward and with gradients, MiB, seconds, and (outcome, gradients)."""

    forward: float
    backward: float
    temporaries: float
    compiling: float
    values: list[Any]


def difference(ours: list[Any], theirs: list[Any]) -> float:
    """The largest difference of arrays, each relative to the largest of its own."""
    import jax.numpy as jnp

    def apart(a: Any, b: Any) -> float:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(jnp.abs(a - b).max() / jnp.abs(b).max())

    return max(map(apart, ours, theirs))


def measure(
    name: str, device: Any, args: argparse.Namespace, length: int, heads: int, width: int, masked: bool
) -> Measured | str:
    """One kernel in one case, or why there is none."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from silkie_jax.hardware.kernel import attention_kernel
    from silkie_jax.hardware.mesh import AXES

    mesh = Mesh(np.asarray([device]).reshape(1, 1, 1), AXES)
    try:
        kernel = attention_kernel(name, "bfloat16", mesh)
    except UserError as e:
        return str(e)
    if kernel.name == "flash" and kernel.platform == "interpret":
        return "would be interpreted here"

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, branches: jax.Array) -> jax.Array:
        return kernel.among(branches)(q, k, v) if masked else kernel.everywhere(q, k, v)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, branches: jax.Array) -> jax.Array:
        return attend(q, k, v, branches).astype(jnp.float32).sum()

    where = NamedSharding(mesh, PartitionSpec())
    part = jax.ShapeDtypeStruct((args.rows, length, heads, width), jnp.bfloat16, sharding=where)
    ids = jax.ShapeDtypeStruct((args.rows, length), jnp.int32, sharding=where)
    began = time.perf_counter()
    try:
        forward = jax.jit(attend).lower(part, part, part, ids).compile()
        backward = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(part, part, part, ids).compile()
        compiling = time.perf_counter() - began
        times, values = (0.0, 0.0), []
        if not args.topology:
            random = np.random.default_rng(0)
            prompt, rest = length // 3, length - length // 3
            row = np.concatenate([np.zeros(prompt, np.int32), np.arange(rest, dtype=np.int32) * 4 // rest + 1])
            arrays = [jnp.asarray(random.standard_normal(part.shape), jnp.bfloat16) for _ in range(3)]
            given = (*arrays, jnp.asarray(np.tile(row, (args.rows, 1))))
            times = (
                milliseconds(partial(forward, *given), args.steps),
                milliseconds(partial(backward, *given), args.steps),
            )
            values = [forward(*given), *backward(*given)[1]]
    except Exception as e:  # whatever a compiler or a driver says of a kernel that it cannot do
        return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0][:120]}"
    memory: Any = backward.memory_analysis()
    return Measured(*times, memory.temp_size_in_bytes / 2**20, compiling, values)


def milliseconds(run: Callable[[], Any], steps: int) -> float:
    """The median of so many calls, after two that warm up."""
    import jax

    for _ in range(2):
        jax.block_until_ready(run())
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


if __name__ == "__main__":
    main()
