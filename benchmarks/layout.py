"""One row of four branches against pairs and against separate sequences: tokens, time, memory, and the same gradients.

    python -m benchmarks.layout [--instructions 4] [--steps 3] [--out results]

At the paper's lengths (a prompt of 330 tokens with an image, four responses of 150, 4.75 pairs an instruction) the same
loss is computed three ways in one run, on a small model: rows of one prompt and four branches; one row a pair; two
sequences a pair with the image encoded in each, as the original stack does.
"""

import argparse
import itertools
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.common import keep
from silkie_jax.preference.logprobs import branch_sums, token_logprobs
from silkie_jax.qwen_vl.config import IMAGE_TOKENS, QwenVLConfig, VisionConfig
from silkie_jax.qwen_vl.lora import add_lora
from silkie_jax.qwen_vl.model import QwenVL
from silkie_jax.training.step import block_wrapper, trainable_filter

PROMPT, RESPONSE, RESPONSES = 330, 150, 4
BETA = 0.1


def small_model() -> QwenVL:
    """Qwen-VL's shape in small: the decoder outweighs the vision tower as in the full model."""
    vision = VisionConfig(
        image_size=112,
        patch_size=14,
        width=64,
        layers=2,
        heads=4,
        mlp_ratio=4.9231,
        output_dim=256,
        image_start_id=7000,
    )
    config = QwenVLConfig(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        kv_channels=64,
        intermediate_size=1376,
        seq_length=2048,
        layer_norm_epsilon=1e-6,
        rotary_emb_base=10000,
        use_dynamic_ntk=True,
        use_logn_attn=True,
        visual=vision,
    )
    model = QwenVL(config, rngs=nnx.Rngs(0))
    add_lora(model, 16, 16, ["c_attn", "attn.c_proj", "w1", "w2"], rngs=nnx.Rngs(1))
    for _, value in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):  # B is zero at a start; here it moves
        value[...] = 0.02 * jax.random.normal(jax.random.key(value.size), value.shape)
    return model


def sequence(config: QwenVLConfig, prompt: np.ndarray, responses: list[np.ndarray]) -> dict[str, np.ndarray]:
    """One row: a prompt and branches; all but two tokens of a response are labelled."""
    out: dict[str, list] = {
        k: [] for k in ("tokens", "positions", "branches", "predecessors", "labels", "label_branches")
    }
    out["tokens"] += prompt.tolist()
    out["positions"] += range(len(prompt))
    out["branches"] += [0] * len(prompt)
    for branch, response in enumerate(responses, start=1):
        for offset, token in enumerate(response.tolist()):
            if offset not in (1, 2):
                out["predecessors"].append(len(out["tokens"]) - 1 if offset else len(prompt) - 1)
                out["labels"].append(token)
                out["label_branches"].append(branch)
            out["tokens"].append(token)
            out["positions"].append(len(prompt) + offset)
            out["branches"].append(branch)
    return {name: np.array(values, np.int32) for name, values in out.items()}


def layouts(config: QwenVLConfig, instructions: int) -> dict[str, tuple[dict[str, np.ndarray], np.ndarray]]:
    """Arrays [B, ...] with images, and pairs as places in the flattened [B, K], for each layout."""
    random = np.random.default_rng(0)
    prompts, answers, images, chosen = [], [], [], []
    possible = list(itertools.combinations(range(RESPONSES), 2))
    for n in range(instructions):
        text = random.integers(0, 6000, PROMPT - IMAGE_TOKENS - 2)
        span = [config.image_start, *[config.image_start + 2] * IMAGE_TOKENS, config.image_end]
        prompts.append(np.concatenate([text[:8], span, text[8:]]))
        answers.append([random.integers(0, 6000, RESPONSE) for _ in range(RESPONSES)])
        images.append(random.integers(0, 256, (config.visual.image_size, config.visual.image_size, 3), np.uint8))
        chosen.append(possible[: 4 if n % 4 == 3 else 5])  # 4.75 pairs an instruction over four

    def join(rows: list[tuple[int, list[int]]]) -> dict[str, np.ndarray]:
        made = [sequence(config, prompts[n], [answers[n][k] for k in some]) for n, some in rows]
        arrays = {name: np.stack([row[name] for row in made]) for name in made[0]}
        return arrays | {"images": np.stack([images[n] for n, _ in rows])[:, None]}

    every = [(n, pair) for n, some in enumerate(chosen) for pair in some]
    return {
        "rows": (
            join([(n, list(range(RESPONSES))) for n in range(instructions)]),
            np.array([[n * RESPONSES + a, n * RESPONSES + b] for n, (a, b) in every]),
        ),
        "pairs": (join([(n, list(pair)) for n, pair in every]), np.arange(2 * len(every)).reshape(-1, 2)),
        "separate": (
            join([(n, [k]) for n, pair in every for k in pair]),
            np.arange(2 * len(every)).reshape(-1, 2),
        ),
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


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instructions", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", help="a file, or `results` for benchmarks/results")
    args = parser.parse_args()
    model = small_model()
    runs, table = {}, {}
    for name, (arrays, pairs) in layouts(model.config, args.instructions).items():
        compiled, run = compile_loss(model, arrays, pairs)
        value, gradient = jax.block_until_ready(run())
        runs[name] = run
        table[name] = {
            "tokens": arrays["tokens"].size,
            "images": len(arrays["images"]),
            "temporaries": compiled.memory_analysis().temp_size_in_bytes,
            "loss": float(value),
            "gradient": np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(gradient)]),
            "times": [],
        }
    for _ in range(args.steps):  # in turns, so that the machine's mood is the same for all
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            table[name]["times"].append(time.perf_counter() - began)
    ours, norm = table["rows"], np.linalg.norm(table["rows"]["gradient"])
    lines = [
        f"{args.instructions} instructions: prompts of {PROMPT} tokens with an image, "
        f"{RESPONSES} responses of {RESPONSE}, 4.75 pairs each",
        "",
        "| layout | tokens | x | images | s a step (median) | x | temporaries, MiB | x | loss | gradient differs by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    fast = statistics.median(ours["times"])
    for name, row in table.items():
        seconds = statistics.median(row["times"])
        apart = np.linalg.norm(row["gradient"] - ours["gradient"]) / norm
        lines.append(
            f"| {name} | {row['tokens']} | {row['tokens'] / ours['tokens']:.2f} | {row['images']} | {seconds:.2f} | "
            f"{seconds / fast:.2f} | {row['temporaries'] / 2**20:.0f} | "
            f"{row['temporaries'] / ours['temporaries']:.2f} | {row['loss']:.6f} | {apart:.1e} |"
        )
    keep("layout", "\n".join(lines), args.out)


if __name__ == "__main__":
    main()
