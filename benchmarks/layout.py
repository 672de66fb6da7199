"""One row of four branches against pairs and against separate sequences: tokens, time, memory, and the same gradients.

    python -m benchmarks.layout [--size scaled|wide] [--instructions 4] [--turns 3] [--out results]

At the paper's lengths (a prompt of 330 tokens with an image, four responses of 150, 4.75 pairs an instruction) the same
loss is computed three ways in one run: rows of one prompt and four branches; one row a pair; two sequences a pair with
the image encoded in each, as the original stack does. The model is small, but vision tower, decoder and vocabulary have
the shares of the work that they have at full size (workload.py): with other shares the ratio would be another one.
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common import keep
from benchmarks.workload import (
    BETA,
    LORA_ALPHA,
    MODELS,
    PROMPT,
    RESPONSE,
    RESPONSES,
    Instruction,
    lora_rank,
    make_instructions,
    work_of,
)
from silkie_jax.models.qwen_vl.config import QWEN_VL_CHAT, QwenVLConfig
from silkie_jax.models.qwen_vl.flops import Training, step_flops
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.nn.lora import add_lora
from silkie_jax.preference.counts import Work
from silkie_jax.preference.forward import block_wrapper
from silkie_jax.preference.logprobs import branch_sums, token_logprobs
from silkie_jax.training.optimizer import trainable_filter

ARRAYS = ("tokens", "positions", "branches", "predecessors", "labels", "label_branches")
TARGETS = ("c_attn", "attn.c_proj", "w1", "w2")


def make_model(size: str) -> QwenVL:
    """A random model with a random adapter: B is zero at a start, here it moves."""
    config = MODELS[size]
    model = QwenVL(config, rngs=nnx.Rngs(0))
    rank = lora_rank(config)
    add_lora(model, rank, LORA_ALPHA * rank, TARGETS, rngs=nnx.Rngs(1))
    for _, value in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        value[...] = 0.02 * jax.random.normal(jax.random.key(value.size), value.shape)
    return model


def layouts(config: QwenVLConfig, instructions: int) -> dict[str, tuple[dict[str, np.ndarray], np.ndarray, Work]]:
    """Arrays [B, ...] with images, pairs as places in the flattened [B, K], and the work of it, for each layout."""
    made = make_instructions(config, instructions)

    def join(some: list[tuple[Instruction, list[int]]]) -> tuple[dict[str, np.ndarray], Work]:
        rows = [instruction.row(branches) for instruction, branches in some]
        arrays = {name: np.stack([getattr(row, name) for row in rows]) for name in ARRAYS}
        return arrays | {"images": np.stack([instruction.image for instruction, _ in some])[:, None]}, work_of(rows)

    every = [(instruction, pair) for instruction in made for pair in instruction.pairs]
    in_rows = [[n * RESPONSES + k for k in pair] for n, instruction in enumerate(made) for pair in instruction.pairs]
    in_turn = np.arange(2 * len(every)).reshape(-1, 2)
    rows, pairs, separate = (
        join([(instruction, list(range(RESPONSES))) for instruction in made]),
        join([(instruction, list(pair)) for instruction, pair in every]),
        join([(instruction, [k]) for instruction, pair in every for k in pair]),
    )
    return {
        "rows": (rows[0], np.array(in_rows), rows[1]),
        "pairs": (pairs[0], in_turn, pairs[1]),
        "separate": (separate[0], in_turn, separate[1]),
    }


def compile_loss(model: QwenVL, arrays: dict[str, np.ndarray], pairs: np.ndarray):
    """A compiled (trainable, arrays) -> (loss, gradient) of DPO with the adapter-off reference."""
    graph, trainable, frozen = nnx.split(model, trainable_filter(lora=True, train_vision="none"), ...)
    branches = int(arrays["label_branches"].max())
    wrap = block_wrapper("full", None)

    def logps(policy: QwenVL, batch: dict, features: jax.Array, adapter: bool) -> jax.Array:
        hidden = policy.hidden(
            batch["tokens"], batch["positions"], batch["branches"], features, train=True, adapter=adapter, wrap=wrap
        )
        head = policy.language.lm_head.weight[...]
        values = token_logprobs(hidden, batch["predecessors"], batch["labels"], head, frozen_head=True)
        return branch_sums(values, batch["label_branches"], branches).reshape(-1)

    def loss(trainable: nnx.State, batch: dict) -> jax.Array:
        policy = nnx.merge(graph, trainable, frozen)
        features = policy.encode_images(batch["images"])
        ratio = logps(policy, batch, features, True) - jax.lax.stop_gradient(logps(policy, batch, features, False))
        margin = ratio[pairs[:, 0]] - ratio[pairs[:, 1]]
        return -jax.nn.log_sigmoid(BETA * margin).mean()

    batch = {name: jnp.asarray(values) for name, values in arrays.items()}
    compiled = jax.jit(jax.value_and_grad(loss)).lower(trainable, batch).compile()
    return compiled, partial(compiled, trainable, batch)


def work_ratio(config: QwenVLConfig, work: Work, baseline: Work) -> float:
    """Operations of a step on `work` over those on `baseline`, by formula, rematerialisation included."""
    training = Training(lora_rank(config), TARGETS, live_reference=True)
    return step_flops(config, work, training).hardware / step_flops(config, baseline, training).hardware


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=MODELS, default="scaled")
    parser.add_argument("--instructions", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", help="a file, or `results` for benchmarks/results")
    args = parser.parse_args()
    model = make_model(args.size)
    made = layouts(model.config, args.instructions)
    runs, table, first = {}, {}, {}
    for name, (arrays, pairs, work) in made.items():
        compiled, run = compile_loss(model, arrays, pairs)
        value, gradient = jax.block_until_ready(run())
        began = time.perf_counter()
        jax.block_until_ready(run())
        runs[name], first[name] = run, time.perf_counter() - began
        table[name] = {
            "work": work,
            "temporaries": compiled.memory_analysis().temp_size_in_bytes,
            "loss": float(value),
            "gradient": np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(gradient)]),
            "times": [],
            "busy": [],
        }
    for _ in range(args.turns):  # in turns of about the same length, so that the machine's mood is the same for all
        for name, run in runs.items():
            steps = max(1, round(max(first.values()) / first[name]))
            began, busy = time.perf_counter(), time.process_time()
            for _ in range(steps):
                jax.block_until_ready(run())
            table[name]["times"].append((time.perf_counter() - began) / steps)
            table[name]["busy"].append((time.process_time() - busy) / steps)
    ours, norm = table["rows"], np.linalg.norm(table["rows"]["gradient"])
    lines = [
        f"{args.instructions} instructions: prompts of {PROMPT} tokens with an image, "
        f"{RESPONSES} responses of {RESPONSE}, 4.75 pairs each; model: {args.size}; median of {args.turns} turns. "
        "Work: operations by formula, adapter-off reference and full rematerialisation.",
        "",
        "| layout | tokens | x | images | work here, x | work at full size, x | s a step | x | processor s a step | x "
        "| temporaries, MiB | x | loss | gradient differs by |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    median = statistics.median
    for name, row in table.items():
        (seconds, busy), work, base = (median(row[kind]) for kind in ("times", "busy")), row["work"], ours["work"]
        apart = np.linalg.norm(row["gradient"] - ours["gradient"]) / norm
        lines.append(
            f"| {name} | {work.tokens} | {work.tokens / base.tokens:.2f} | {work.images} | "
            f"{work_ratio(model.config, work, base):.2f} | {work_ratio(QWEN_VL_CHAT, work, base):.2f} | "
            f"{seconds:.2f} | {seconds / median(ours['times']):.2f} | {busy:.2f} | {busy / median(ours['busy']):.2f} | "
            f"{row['temporaries'] / 2**20:.0f} | "
            f"{row['temporaries'] / ours['temporaries']:.2f} | {row['loss']:.6f} | {apart:.1e} |"
        )
    keep(f"layout-{args.size}", "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
