"""Fused log-probabilities against full logits and log_softmax: time, compiled temporaries, values and gradients.

    python -m benchmarks.logprobs [--size scaled] [--rows 2] [--labels 592 1184 2368] [--turns 3] [--out results]

Both sides get the same hidden states of the same labelled positions, and a gradient is taken to the hidden states
(frozen head, as with LoRA) or to hidden states and head (trained head). The full side holds [rows, labels, vocabulary]
in float32; the fused side must not, so that its temporaries grow with labels x width only. `full` size is Qwen-VL's
head, 151,936 x 4096, in bfloat16; `scaled` an eighth of either, in float32.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import keep
from silkie_jax.preference.logprobs import CHUNK, token_logprobs

SIZES = {"full": (151_936, 4096, "bfloat16"), "scaled": (18_992, 512, "float32"), "tiny": (2_374, 64, "float32")}
LABELS = (592, 1184, 2368)  # 592: four responses of 150


def full_logprobs(
    hidden: jax.Array, predecessors: jax.Array, labels: jax.Array, head: jax.Array, *, frozen_head: bool
) -> jax.Array:
    """What most training code does: all scores at once, log_softmax in float32, and a look-up."""
    del frozen_head  # nothing is different but what is differentiated
    rows = jnp.take_along_axis(hidden, predecessors[..., None], axis=1)
    precision = None if rows.dtype == jnp.bfloat16 else "highest"
    scores = jnp.einsum("bnw,vw->bnv", rows, head, precision=precision, preferred_element_type=jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), labels[..., None], axis=-1)[..., 0]


SIDES: dict[str, Callable] = {"fused": token_logprobs, "full": full_logprobs}


def measured(side: str, trained: bool) -> Callable:
    """(hidden, head, predecessors, labels, weights) -> ((sum, log-probabilities), gradients)."""

    def loss(hidden: jax.Array, head: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        predecessors, labels, weights = rest
        logps = SIDES[side](hidden, predecessors, labels, head, frozen_head=not trained)
        return (logps * weights).sum(), logps

    return jax.value_and_grad(loss, argnums=(0, 1) if trained else 0, has_aux=True)


def make_arguments(size: str, rows: int, count: int) -> tuple[jax.Array, ...]:
    """Random hidden states of `rows` rows in which every position predicts a label, and a head."""
    vocabulary, width, dtype = SIZES[size]
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (rows, count, width), jnp.dtype(dtype))
    head = (0.02 * jax.random.normal(keys[1], (vocabulary, width), jnp.float32)).astype(dtype)
    predecessors = jnp.broadcast_to(jnp.arange(count), (rows, count))
    labels = jax.random.randint(keys[2], (rows, count), 0, vocabulary)
    return hidden, head, predecessors, labels, jax.random.normal(keys[3], (rows, count))


def apart(ours: Any, theirs: Any) -> float:
    """Relative distance of two trees of arrays, by their norms."""

    def norm(*some: Any) -> float:
        return float(np.sqrt(sum(float(jnp.square(x.astype(jnp.float32)).sum()) for x in some)))

    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    return norm(*(a.astype(jnp.float32) - b.astype(jnp.float32) for a, b in zip(ours, theirs, strict=True))) / norm(
        *theirs
    )


def compare(size: str, rows: int, count: int, trained: bool, turns: int) -> str:
    """One line of the table: fused and full in turns."""
    arguments = make_arguments(size, rows, count)
    compiled, found, temporaries = {}, {}, {}
    for side in SIDES:
        compiled[side] = jax.jit(measured(side, trained)).lower(*arguments).compile()
        memory: Any = compiled[side].memory_analysis()
        temporaries[side] = memory.temp_size_in_bytes
        try:
            found[side] = jax.block_until_ready(compiled[side](*arguments))
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
    times: dict[str, list[float]] = {side: [] for side in found}
    values, gradients = "", ""
    if len(found) == len(SIDES):
        (_, logps), gradient = found["fused"]
        (_, expected), expected_gradient = found["full"]
        values, gradients = f"{abs(logps - expected).max():.1e}", f"{apart(gradient, expected_gradient):.1e}"
    found.clear()
    for _ in range(turns):
        for side, seconds in times.items():
            began = time.perf_counter()
            jax.block_until_ready(compiled[side](*arguments))
            seconds.append(time.perf_counter() - began)
    took = {side: statistics.median(seconds) for side, seconds in times.items()}
    shown = [f"{1000 * took[side]:.0f}" if side in took else "out of memory" for side in SIDES]
    ratio = f"{took['full'] / took['fused']:.2f}" if len(took) == 2 else ""
    scores = 4 * rows * count * SIZES[size][0]
    return (
        f"| {'trained' if trained else 'frozen'} | {count} | {shown[0]} | {shown[1]} | {ratio} | "
        f"{temporaries['fused'] / 2**20:.0f} | {temporaries['full'] / 2**20:.0f} | "
        f"{temporaries['full'] / temporaries['fused']:.1f} | {scores / 2**20:.0f} | {values} | {gradients} |"
    )


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="default: full on an accelerator, scaled on a CPU")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--labels", type=int, nargs="+", default=list(LABELS), help="labelled positions a row")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", help="a file, or `results` for benchmarks/results")
    args = parser.parse_args()
    size = args.size or ("scaled" if jax.default_backend() == "cpu" else "full")
    vocabulary, width, dtype = SIZES[size]
    lines = [
        f"Head {vocabulary} x {width}, {dtype}, {args.rows} rows, chunks of {CHUNK} labels a row; medians of "
        f"{args.turns} turns, forward and backward. One copy of all scores: rows x labels x vocabulary in float32.",
        "",
        "| head | labels a row | fused, ms | full, ms | full / fused | temporaries fused, MiB | full, MiB | x "
        "| one copy of all scores, MiB | values differ by | gradients differ by |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for trained in (False, True):
        for count in args.labels:
            lines.append(compare(size, args.rows, count, trained, args.turns))
            print(lines[-1], flush=True)
            keep(f"logprobs-{size}", "\n".join(lines), args.out, finished=False)
    keep(f"logprobs-{size}", "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
