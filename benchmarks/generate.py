"""The engine that generates, against one request after the other, against groups of equal ones, and against PyTorch.

    python -m benchmarks.generate [--size tiny] [--requests 48] [--slots 16] [--sides one-by-one groups pytorch]
        [--turns 3] [--out results]

Every request shows an image; prompts have 280 to 700 tokens, answers 1 to 300, and all are asked at once. Weights are
random, so that hardly an answer ends early. `one-by-one` is `silkie_jax.generate` for each request; `groups` puts up to
eight requests of like prompts and equal limits into one call of it. Both compile a program for each shape, which is
done before the clock starts; the engine has few. `pytorch` is Hugging Face's `generate` of the same architecture
(peer_torch.py), one by one, and in batches of eight as they come. Then the form of MME, two short questions an image,
what four samples of a prompt cost beyond one, and four answers to each prompt, together and one after the other.
`--size full` is Qwen-VL-Chat in bfloat16.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import devices, keep
from benchmarks.workload import MODELS
from silkie_jax.errors import UserError
from silkie_jax.generation.requests import Request
from silkie_jax.models.qwen_vl.config import IMAGE_TOKENS, QwenVLConfig

PROMPTS, ANSWERS = (280, 420, 560, 700), (1, 20, 80, 160, 300)
CONTEXT = 1024
SIDES = ("one-by-one", "groups", "pytorch")
ROOT = Path(__file__).resolve().parents[1]


def make_requests(config: QwenVLConfig, count: int, seed: int = 0) -> list[Request]:
    """Requests with an image each, of mixed lengths."""
    random = np.random.default_rng(seed)
    side = config.visual.image_size
    made = []
    for _ in range(count):
        image = random.integers(0, 256, (side, side, 3), np.uint8)
        made.append(_request(config, random, image, int(random.choice(PROMPTS)), int(random.choice(ANSWERS))))
    return made


def make_questions(config: QwenVLConfig, images: int) -> list[Request]:
    """Two questions about each image, one after the other, with answers of four tokens: the form of MME."""
    random = np.random.default_rng(1)
    side = config.visual.image_size
    pixels = random.integers(0, 256, (images, side, side, 3), np.uint8)
    return [_request(config, random, pixels[n // 2], 310, 4) for n in range(2 * images)]


def _request(config: QwenVLConfig, random: np.random.Generator, image: np.ndarray, prompt: int, new: int) -> Request:
    span = [config.image_start, *[config.image_start + 2] * IMAGE_TOKENS, config.image_end]
    text = random.integers(0, config.end_of_text, prompt - len(span)).tolist()
    return Request([*text[:8], *span, *text[8:]], [image], new)


def random_model(config: QwenVLConfig, dtype: str) -> Any:
    """A model with random weights, made on the device."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from silkie_jax.models.qwen_vl.model import QwenVL

    shapes = nnx.eval_shape(lambda: QwenVL(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(shapes)
    leaves, kinds = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))

    @partial(jax.jit, static_argnums=(1, 2))
    def draw(key: jax.Array, shape: tuple[int, ...], kind: Any) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, kind)

    return nnx.merge(
        graph, jax.tree.unflatten(kinds, [draw(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])
    )


def one_by_one(model: Any, requests: list[Request]) -> int:
    """Each request by itself; returns how many tokens came."""
    return sum(_generate(model, [request]) for request in requests)


def in_groups(model: Any, requests: list[Request]) -> int:
    """Up to eight of one padded length and one limit at a time, filled up to a power of two."""
    kinds: dict[tuple[int, int], list[Request]] = {}
    for request in requests:
        kinds.setdefault((-(-len(request.tokens) // 64), request.max_new_tokens), []).append(request)
    groups = [some[first : first + 8] for some in kinds.values() for first in range(0, len(some), 8)]
    return sum(_generate(model, group) for group in groups)


def _generate(model: Any, group: list[Request]) -> int:
    from silkie_jax.generation.generate import generate

    rows = group + [group[-1]] * ((1 << (len(group) - 1).bit_length()) - len(group))
    width = len(group[0].tokens) if len(group) == 1 else -(-len(group[0].tokens) // 64) * 64
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for n, request in enumerate(rows):
        tokens[n, width - len(request.tokens) :], mask[n, width - len(request.tokens) :] = request.tokens, True
    images = np.stack([image for request in rows for image in request.images])
    out = np.asarray(generate(model, tokens, images, group[0].max_new_tokens, mask))[: len(group)]
    ended = out == model.config.end_of_text
    return int(np.where(ended.any(1), ended.argmax(1) + 1, out.shape[1]).sum())


def in_jax(args: argparse.Namespace, size: str) -> dict[str, Any]:
    """Seconds and tokens of the engine and of the other ways in JAX, in turns."""
    import jax

    from silkie_jax.generation.engine import Engine
    from silkie_jax.hardware.kernel import sound_keeper, sound_kernel
    from silkie_jax.hardware.mesh import make_mesh

    config, dtype = MODELS[size], "float32" if jax.default_backend() == "cpu" else "bfloat16"
    requests, questions = make_requests(config, args.requests), make_questions(config, args.images)
    model, mesh = random_model(config, dtype), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    kernel, keeper = sound_kernel("auto", dtype, mesh), sound_keeper(dtype, mesh)
    engine = Engine(model, context=CONTEXT, slots=args.slots, mesh=mesh, kernel=kernel, keeper=keeper)
    print(f"prompts: {kernel.name}, tokens: {keeper.kernel.name}", file=sys.stderr, flush=True)

    def ours(some: list[Request]) -> int:
        before = engine.meters.tokens
        for _ in engine.run(some):
            pass
        engine.forget_images()
        return engine.meters.tokens - before

    sides: dict[str, Callable[[], int]] = {"engine": lambda: ours(requests), "mme engine": lambda: ours(questions)}
    for n in (1, 4):  # one request at a time: its prompt, and one step for all its samples
        several = [dataclasses.replace(r, max_new_tokens=1, temperature=1.0, n=n) for r in requests]
        sides[f"n={n}"] = partial(lambda some: sum(ours([request]) for request in some), several)
    samples = [
        dataclasses.replace(request, max_new_tokens=40, temperature=1.0, seed=seed)
        for request in requests[: max(args.slots // 4, 1)]
        for seed in range(4)
    ]
    sides |= {
        "samples together": lambda: ours(samples),
        "samples apart": lambda: sum(ours([request]) for request in samples),
    }
    if "one-by-one" in args.sides:
        sides |= {
            "one-by-one": lambda: one_by_one(model, requests),
            "mme one-by-one": lambda: one_by_one(model, questions),
        }
    if "groups" in args.sides:
        sides["groups"] = lambda: in_groups(model, requests)
    found: dict[str, Any] = {}
    for turn in range(args.turns + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            tokens = run()
            took = time.perf_counter() - began
            print(f"turn {turn}, {name}: {took:.2f} s", file=sys.stderr, flush=True)
            if turn:
                found[name]["seconds"].append(took)
            else:  # this one compiles
                found[name] = {"seconds": [], "tokens": tokens, "first": took}
    found["meters"] = {"text": str(engine.meters), "steps": engine.meters.steps}
    return found


def in_torch(args: argparse.Namespace, size: str) -> dict[str, Any]:
    """Seconds and tokens of Hugging Face's generate."""
    import torch

    from benchmarks.peer_torch import Recipe, make_model

    config = MODELS[size]
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    peer = make_model(config, Recipe(), device, dtype)
    decoder = peer.decoder.merge_and_unload().eval()
    decoder.gradient_checkpointing_disable()
    requests = make_requests(config, args.requests)

    @torch.no_grad()
    def generate(group: list[Request]) -> int:
        width, most = max(len(r.tokens) for r in group), max(r.max_new_tokens for r in group)
        tokens, mask = (torch.zeros(len(group), width, dtype=torch.long, device=device) for _ in range(2))
        for n, request in enumerate(group):
            tokens[n, width - len(request.tokens) :] = torch.tensor(request.tokens, device=device)
            mask[n, width - len(request.tokens) :] = 1
        pixels = np.stack([image for request in group for image in request.images]).transpose(0, 3, 1, 2) / 255
        patches = peer.vision(torch.tensor(pixels, device=device, dtype=dtype)).last_hidden_state[:, 1:]
        x = decoder.get_input_embeddings()(tokens)
        places = (tokens == config.image_start + 2)[..., None].expand_as(x)
        x = x.masked_scatter(places, peer.resampler(patches).to(x.dtype))
        out = decoder.generate(
            inputs_embeds=x, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=False,
            use_cache=True, pad_token_id=0,
        )  # fmt: skip
        assert out.shape[1] == most
        if device == "cuda":
            torch.cuda.synchronize()
        return sum(request.max_new_tokens for request in group)

    found = {}
    for name, at_once in (("pytorch one-by-one", 1), ("pytorch batches of 8", 8)):
        groups = [requests[first : first + at_once] for first in range(0, len(requests), at_once)]
        generate(groups[0][:1])  # warms up
        times = []
        for _ in range(args.turns):
            began = time.perf_counter()
            tokens = sum(map(generate, groups))
            times.append(time.perf_counter() - began)
        found[name] = {"seconds": times, "tokens": tokens}
        print(f"{name}: {statistics.median(times):.2f} s", file=sys.stderr, flush=True)
    return found


def table(found: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """The results as Markdown."""

    def seconds(name: str) -> float:
        return statistics.median(found[name]["seconds"])

    def rate(name: str) -> float:
        return found[name]["tokens"] / seconds(name)

    lines = [
        "| side | s | tokens/s | requests/s | engine : side | first time, compiling, s |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("engine", "one-by-one", "groups", "pytorch one-by-one", "pytorch batches of 8"):
        if name in found:
            cells = f"{seconds(name):.2f} | {rate(name):.0f} | {args.requests / seconds(name):.2f}"
            first = f"{found[name]['first']:.1f}" if "first" in found[name] else ""
            lines.append(f"| {name} | {cells} | {rate('engine') / rate(name):.2f} | {first} |")
    lines += ["", f"The engine over all its turns: {found['meters']['text']}.", ""]
    ours = 2 * args.images / seconds("mme engine")
    line = f"MME's form, two questions an image: {ours:.2f} questions/s"
    if "mme one-by-one" in found:
        theirs = 2 * args.images / seconds("mme one-by-one")
        line += f", one by one {theirs:.2f}: {ours / theirs:.2f}"
    lines += [line + ".", ""]
    four = seconds("n=4") / seconds("n=1")
    lines.append(
        f"The first token of four samples of a prompt : of one = {four:.2f} in time, one prompt after the other."
    )
    apart = seconds("samples apart") / seconds("samples together")
    lines.append(
        f"Four answers of 40 tokens to a prompt, by four seeds, one after the other : together = {apart:.2f} in time."
    )
    return lines


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=MODELS, help="default: full on an accelerator, tiny on a CPU")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--images", type=int, default=24, help="of the form of MME")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=["one-by-one", "groups"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="the most that a side's process may take")
    parser.add_argument("--out", help="a file, or `results` for benchmarks/results")
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = args.size or ("tiny" if devices().endswith(("cpu", "no device")) else "full")
    if args.worker:
        print(json.dumps(in_jax(args, size) if args.worker == "jax" else in_torch(args, size)))
        return
    found: dict[str, Any] = {}
    for worker in ("jax", "torch"):
        if worker == "torch" and "pytorch" not in args.sides:
            continue
        command = [sys.executable, "-m", "benchmarks.generate", *sys.argv[1:], "--size", size, "--worker", worker]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=60 * args.minutes)
        except subprocess.TimeoutExpired:
            print(f"{worker}: stopped after {args.minutes:g} minutes", file=sys.stderr)
            continue
        if done.returncode:
            raise UserError(f"the {worker} side failed with status {done.returncode} (its message is above)")
        found |= json.loads(done.stdout.strip().splitlines()[-1])
        if "engine" in found:
            how = f"{size} model, {args.requests} requests, {args.slots} slots"
            lines = [f"`python -m benchmarks.generate {' '.join(sys.argv[1:])}`", "", how, "", *table(found, args)]
            keep(
                f"generate-{size}",
                "\n".join(lines),
                args.out,
                finished=worker == "torch" or "pytorch" not in args.sides,
            )


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
