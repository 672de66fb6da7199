"""The real training step in variants, each against the first one, and against a PyTorch peer.

    python -m benchmarks.step [--size scaled] [--remat full dots none] [--batch-rows 4] [--reference precomputed]
        [--attention auto] [--loss sigmoid '{name: vdpo, guide: policy}'] [--also KEY=VALUE,...] [--set KEY=VALUE ...]
        [--peer [trl tricks ...]] [--out results]

The step is that of `silkie train configs/silkie.yaml` (training/trainer.py) with random weights, made on the device;
its input lies there before the clock starts. `--size full` is Qwen-VL-Chat, 9.66 billion parameters with LoRA of rank
64; `scaled` has the same shares of work on a CPU (workload.py). Prompts of 330 tokens with an image, four responses of
150, 4.75 pairs an instruction, padded as the library pads them. Every combination of the given values is a variant, in
a process of its own. MFU: model FLOPs by formula (training/flops.py; rematerialisation is not counted) over the peak of
the chip (training/chips.py). The precomputed reference is given as zeros, so that its loss starts anywhere; variants
with one reference and one batch must start alike. `--peer` measures benchmarks/peer_torch.py in the same turns and
prints `ours : peer`.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import yaml  # which Flax brings along

from benchmarks import peer_torch, turns
from benchmarks.common import keep
from benchmarks.workload import LORA_ALPHA, MODELS, RESPONSES, lora_rank, make_instructions, work_of
from silkie_jax.errors import UserError
from silkie_jax.training.config import TrainConfig, complete

# Keys of the training configuration that can be varied, with their values by default (one more is one line more), and
# `tokens`, the length that rows are padded to (null: as the library pads them).
VARIED: dict[str, list[str]] = {
    "batch_rows": ["4"],
    "accumulate": ["1"],
    "remat": ["full", "dots", "none"],
    "reference": ["precomputed"],
    "loss": ["sigmoid"],
    "attention": ["auto"],
    "features": ["live"],
    "quantize": ["null"],
    "compute": ["null"],
    "tokens": ["null"],
}
KEYS = list(VARIED)


def make_variants(args: argparse.Namespace, size: str) -> list[turns.Variant]:
    """Every combination of the values given, then those of `--also`; what all have in common is not in the names."""
    given = {key: getattr(args, key) for key in KEYS}
    combinations = [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values())]
    for more in args.also:
        changes = dict(part.partition("=")[::2] for part in more.split(","))
        if not changes.keys() <= set(KEYS):
            raise UserError(f"--also {more}: write KEY=VALUE,KEY=VALUE with keys of {', '.join(KEYS)}")
        combinations.append(combinations[0] | changes)
    several = [key for key in KEYS if len({chosen[key] for chosen in combinations}) > 1]
    out = []
    for chosen in combinations:
        name = ", ".join(f"{key} {chosen[key]}" for key in several) or "ours"
        tokens = yaml.safe_load(chosen.pop("tokens"))
        overrides = [f"{key}={value}" for key, value in chosen.items()] + args.set
        options = {"size": size, "overrides": overrides, "tokens": tokens}
        out.append(turns.Variant(name, "benchmarks.step", options | {"steps": args.steps, "warmup": args.warmup}))
    return out


def make_config(overrides: list[str]) -> TrainConfig:
    """Silkie's recipe (TrainConfig's defaults) with `key=value` changes. Needs no YAML file and so no OmegaConf."""
    config = TrainConfig(model="random", corpus="random", run_dir="none", steps=1000)
    for item in overrides:
        key, _, value = item.partition("=")
        *path, name = key.split(".")
        try:
            place = functools.reduce(getattr, path, config)
            before = getattr(place, name)
        except AttributeError:
            raise UserError(f"--set {item}: the training config has no key {key}") from None
        given = yaml.safe_load(value)
        setattr(place, name, float(given) if isinstance(before, float) and given is not None else given)
    return complete(config)


def random_state(program: Any) -> Any:
    """The state of a run with random weights, each made where it will lie."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from silkie_jax.nn.quantize import is_code

    def draw(path: tuple, struct: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if path[-1] in ("bias", "lora_b"):
            return jnp.zeros(struct.shape, struct.dtype)
        if struct.dtype == jnp.int8:
            return jax.random.randint(key, struct.shape, -127, 128, jnp.int8)
        if is_code(struct.dtype):  # e4m3, 73 in the mean square as well, and never beyond what it can say
            return (73 * jax.random.truncated_normal(key, -6, 6, struct.shape, jnp.float32)).astype(struct.dtype)
        if path[-1] in ("scale", "wte_scale"):  # of codes that are 73 in the mean square
            return jnp.full(struct.shape, 0.02 / 73, struct.dtype)
        if any(str(part).startswith("ln_") for part in path):
            return jnp.ones(struct.shape, struct.dtype)
        return 0.02 * jax.random.normal(key, struct.shape, struct.dtype)

    def fill(path: tuple, struct: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        return jax.jit(partial(draw, path, struct), out_shardings=struct.sharding)(key)

    def filled(state: nnx.State, seed: int) -> nnx.State:
        flat = nnx.to_flat_state(state)
        keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(flat))  # much faster than threefry
        made = [
            (path, value.replace(fill(path, value.get_value(), key)))
            for (path, value), key in zip(flat, keys, strict=True)
        ]
        return nnx.from_flat_state(made)

    shapes = program.shapes
    return program.start(nnx.merge(program.graph, filled(shapes.trainable, 0), filled(shapes.frozen, 1)))


def make_batch(
    config: Any, train: TrainConfig, tokens: int | None, fine: bool = False
) -> tuple[dict[str, np.ndarray], Any, Any]:
    """(arrays [A, B, ...], shape, work) of one step. `tokens` replaces the length that rows are padded to.

    Stored features are zeros, so that losses with them are another row's.
    """
    import jax.numpy as jnp

    from silkie_jax.models.qwen_vl.config import IMAGE_TOKENS
    from silkie_jax.preference.batches import collate
    from silkie_jax.preference.grid import make_shape
    from silkie_jax.preference.layout import row_sizes

    count = train.batch_rows * train.accumulate
    made = make_instructions(config, count)
    rows = [instruction.row(list(range(RESPONSES))) for instruction in made]
    shape = make_shape(train.accumulate, train.batch_rows, [np.array(row_sizes(row)) for row in rows], fine)
    if tokens:
        if tokens < len(rows[0].tokens):
            raise UserError(f"--tokens {tokens}: a row has {len(rows[0].tokens)}")
        shape = shape._replace(tokens=tokens)
    flat = collate([[row] for row in rows], shape, config.end_of_text)
    if train.features == "precomputed":
        flat["features"] = np.zeros((count, 1, IMAGE_TOKENS, config.visual.output_dim), jnp.dtype(train.dtype))
    else:
        flat["images"] = np.stack([instruction.image for instruction in made])[:, None]
    if train.reference == "precomputed":
        for name in ("reference_logps", *(["reference_null_logps"] if train.stored_null_image else [])):
            flat[name] = np.zeros((count, shape.branches), np.float32)
    arrays = {k: v.reshape(train.accumulate, train.batch_rows, *v.shape[1:]) for k, v in flat.items()}
    return arrays, shape, work_of(rows)


def matmul_speed(width: int, dtype: str) -> float:
    """FLOP/s of a large matrix product in JAX."""
    import jax
    import jax.numpy as jnp

    left, right = jnp.ones((turns.MATMUL[0], width), dtype), jnp.ones((width, turns.MATMUL[1]), dtype)
    product = jax.jit(partial(jnp.matmul, precision="highest" if dtype == "float32" else None))
    return turns.matmul_speed(lambda: product(left, right), jax.block_until_ready, width)


def measure(options: dict[str, Any]) -> turns.Measured:
    """One variant, in this process."""
    import jax

    from silkie_jax.hardware.chips import find_chip
    from silkie_jax.hardware.kernel import sound_kernel
    from silkie_jax.hardware.mesh import batch_shards, make_mesh, platform_of
    from silkie_jax.models.qwen_vl.flops import step_flops
    from silkie_jax.training.config import training_of
    from silkie_jax.training.trainer import Program, put

    config = MODELS[options["size"]]
    rank = lora_rank(config)
    cpu = jax.default_backend() == "cpu"
    overrides = [f"lora.rank={rank}", f"lora.alpha={LORA_ALPHA * rank}", f"dtype={'float32' if cpu else 'bfloat16'}"]
    train = make_config([*overrides, *options["overrides"]])
    mesh = make_mesh(train.mesh.data, train.mesh.fsdp, train.mesh.tensor)
    if train.batch_rows % batch_shards(mesh):
        raise UserError(f"batch_rows {train.batch_rows} must be a multiple of the {batch_shards(mesh)} devices")
    note = ""
    if train.attention == "auto":  # measured, as `silkie train` does; one that is named is compared by attention.py
        kernel = sound_kernel("auto", train.dtype, mesh, say=lambda line: print(line, file=sys.stderr)).name
        note = f"{kernel} attention"
        train = dataclasses.replace(train, attention=kernel)
    program = Program(train, config, mesh, steps=1000)
    arrays, shape, work = make_batch(config, train, options["tokens"], platform_of(mesh) == "gpu")
    if program.numbers_pairs:
        arrays["pair_order"] = (np.cumsum(arrays["pair_mask"]) - 1).reshape(arrays["pair_mask"].shape).astype(np.int32)
    began = time.perf_counter()
    compiled = program.lower(shape).compile()
    compile_seconds = time.perf_counter() - began
    state, batch = random_state(program), put(arrays, mesh)
    # Given away (donated) to each step, but for the memory.
    trainable, optimizer, memory = state.trainable, state.optimizer, state.memory
    losses, clock = [], turns.Clock()
    for _ in range(options["warmup"] + options["steps"]):
        with clock.step():
            trainable, optimizer, memory, metrics = compiled(
                trainable, optimizer, memory, state.frozen, state.reference, batch
            )
            losses.append(float(metrics["loss"]))  # waits for the step
    sizes: Any = compiled.memory_analysis()
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    needed += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    device = mesh.devices.flat[0]
    chip = find_chip(device.device_kind)
    return turns.Measured(
        device=f"{mesh.devices.size} x {device.device_kind}",
        seconds=clock.seconds[options["warmup"] :],
        busy=clock.busy[options["warmup"] :],
        pairs=work.pairs,
        tokens=work.tokens,
        flops=step_flops(config, work, training_of(train)).model,
        peak_flops=chip.bf16 * mesh.devices.size if chip else None,
        peak=(device.memory_stats() or {}).get("peak_bytes_in_use") or turns.resident_peak(),
        loss=(losses[0], losses[-1]),
        compile_seconds=compile_seconds,
        compiled=needed,
        note=note,
        matmul=matmul_speed(config.hidden_size, train.dtype),
    )


def main() -> None:
    """Measures the variants in turns and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=MODELS, help="default: full on an accelerator, scaled on a CPU")
    for key in KEYS:
        parser.add_argument(f"--{key.replace('_', '-')}", nargs="+", default=VARIED[key], metavar="VALUE")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="KEY=VALUE,...", help="the first variant with these changes"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the training config, in all variants"
    )
    parser.add_argument("--peer", nargs="*", choices=peer_torch.VARIANTS, help="and PyTorch variants (default: all)")
    parser.add_argument("--peer-pairs", type=int, help="pairs of a peer's step (default: the first batch_rows)")
    turns.add_options(parser)
    args = parser.parse_args()
    if args.worker:
        turns.worker(measure, args.worker)
        return
    size = args.size or turns.default_size()
    variants = make_variants(args, size)
    if args.peer is not None:
        peer_torch.check_installed()
        pairs = args.peer_pairs or int(args.batch_rows[0])
        peers = peer_torch.make_variants(args.peer or list(peer_torch.VARIANTS), size, pairs, args)
        variants[2:2] = peers  # what is compared most comes first, should the time run out

    def save(found: dict[str, turns.Measured | str], finished: bool = False) -> None:
        lines = [f"`python -m benchmarks.step {' '.join(sys.argv[1:])}`", ""]
        lines += [f"{size} model on {turns.device_of(found)}", "", *turns.table(found, variants[0].name)]
        lines += peer_torch.against(found, [v.name for v in variants if v.module == "benchmarks.step"])
        keep(f"step-{size}", "\n".join(lines), args.out, finished=finished)

    save(turns.run_in_turns(variants, args.turns or (1 if size == "full" else 3), args, save), finished=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
