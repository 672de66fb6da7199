"""What the training tests share: a tiny checkpoint, small corpora, and steps whose gradients can be looked at."""

import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from examples.tiny_qwen_vl import make_checkpoint
from silkie_jax.corpus import Record, Response
from silkie_jax.corpus.shards import CorpusBuilder
from silkie_jax.hardware.mesh import put
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.nn.attention import PADDING, PLAIN, Kernel
from silkie_jax.preference.batches import Batch, collate, decode_images
from silkie_jax.preference.counts import Work
from silkie_jax.preference.grid import Shape, make_shape, round_up
from silkie_jax.preference.layout import row_sizes
from silkie_jax.preference.rows import Row, make_row
from silkie_jax.training.config import TrainConfig
from silkie_jax.training.config_file import make_config
from silkie_jax.training.optimizer import trainable_filter
from silkie_jax.training.step import MARGINS, Objective, Step

SIDE = 28  # of the tiny model's images: four patches
SIZES = {
    "hidden": 128,
    "heads": 8,
    "layers": 2,
    "ff": 64,
    "vision_width": 32,
    "vision_layers": 2,
    "vision_heads": 4,
    "image_size": SIDE,
}
SMALL_RUN = {
    "lora": {"rank": 2},
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
    "dtype": "float32",
    "remat": "none",
    "mesh": {"data": 1},
    "log_every": 1,
    "evaluation_fraction": 0,
}
"""Keys of a run that learns something in a few steps, on one device."""
ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
TEXTS = (
    "A red circle on a white ground.",
    "Yes.",
    "There are three boxes on the table: one is red, one is green and one is blue, and that is all there is to see.",
    "图片中有一个红色的方框。",
)


def make_tiny(folder: Path, **sizes: int) -> Path:
    """The tiniest checkpoint that has everything."""
    return make_checkpoint(folder, **(SIZES | sizes))


def make_run_folder(folder: Path) -> Path:
    """FOLDER/model and FOLDER/corpus, of four instructions, two of them with an image."""
    make_tiny(folder / "model")
    write_corpus(folder / "corpus", [record(n, images=n % 2) for n in range(4)])
    return folder


def run_config(folder: Path, run: str, **others) -> TrainConfig:
    """The configuration of FOLDER/RUN over FOLDER/model and FOLDER/corpus."""
    paths = {"model": str(folder / "model"), "corpus": str(folder / "corpus"), "run_dir": str(folder / run)}
    return make_config(paths | SMALL_RUN | others)


def image_bytes(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def record(
    number: int, ratings: Sequence[float] = (5, 1, 3, 2), images: int = 1, prompt: str | None = None, words: int = 0
) -> Record:
    """A rated instruction; `words` makes its prompt longer."""
    said = TEXTS[number % len(TEXTS) :] + TEXTS[: number % len(TEXTS)]
    responses = [
        Response(f"{said[k % len(said)]}{'!' * (k // len(said))}", f"model-{k}", dict.fromkeys(ASPECTS, float(rating)))
        for k, rating in enumerate(ratings)
    ]
    prompt = prompt or f"What is in picture {number}?{' Look again.' * words}"
    pictures = tuple(image_bytes(100 * number + i) for i in range(images))
    return Record(f"row-{number}", pictures, prompt, tuple(responses))


def given_record(number: int, images: int = 1) -> Record:
    """A preference pair without ratings."""
    return dataclasses.replace(
        record(number, images=images), responses=(Response(f"No, not {number}."), Response("Yes.")), pairs=((0, 1),)
    )


def write_corpus(folder: Path, records: Iterable[Record]) -> Path:
    """A finished corpus of these records in one shard."""
    records = list(records)
    aspects = list(dict.fromkeys(a for r in records for x in r.responses for a in x.ratings))
    with CorpusBuilder(folder, "tiny", 1) as builder:
        entry = builder.write(0, "key", records, {})
        builder.finish([entry], {}, {"aspects": aspects})
    return folder


def rows_arrays(
    tokenizer, rows: Sequence[Row | None], accumulate: int = 1, length: int = 0, labels: int = 0
) -> dict[str, np.ndarray]:
    """The arrays [A, B, ...] of a batch of these rows, padded to at least `length` tokens and `labels` labels.

    Batches of one shape are compiled once.
    """
    flat = collated(rows, tokenizer.end_of_text)
    for name, size, filler in (
        *((name, length, filler) for name, filler in (("tokens", 0), ("positions", 0), ("branches", PADDING))),
        *((name, labels, 0) for name in ("predecessors", "labels", "label_branches")),
    ):
        missing = max(size - flat[name].shape[1], 0)
        flat[name] = np.pad(flat[name], ((0, 0), (0, missing)), constant_values=filler)
    groups = [[row] if row else [] for row in rows]
    flat |= decode_images(groups, max(len(row.images) for row in rows if row), SIDE)
    return {k: v.reshape(accumulate, len(rows) // accumulate, *v.shape[1:]) for k, v in flat.items()}


def collated(rows: Sequence[Row | None], pad: int) -> dict[str, np.ndarray]:
    """Arrays [R, ...] in the tightest shape; None is an empty row."""
    shape = make_shape(1, len(rows), [np.array(row_sizes(row)) for row in rows if row])
    return collate([[row] if row else [] for row in rows], shape, pad)


def all_pairs(count: int) -> list[tuple[int, int]]:
    """Every response against each later one."""
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def record_row(tokenizer, made: Record, **options) -> Row:
    """A record's row with all its responses, each preferred to the later ones."""
    return make_row(tokenizer, made, all_pairs(len(made.responses)), **options)


def as_batch(arrays: dict[str, np.ndarray]) -> Batch:
    """What `Trainer.update` takes."""
    sizes = {name: array.shape[2] for name, array in arrays.items()}
    images = sizes.get("images", 0)
    shape = Shape(
        *arrays["tokens"].shape[:2], sizes["tokens"], sizes["labels"], sizes["pairs"], images, branches_of(arrays)
    )
    return Batch(arrays, [], Work(), shape)


class Steps:
    """Training steps that move nothing and give their gradients away: `(metrics, gradients by path) = steps(arrays)`.

    The state is the model's; `reference` is another model, for objectives whose reference is a copy. What losses
    remember goes on from step to step (`memory`).
    """

    def __init__(
        self,
        model: QwenVL,
        objective: Objective,
        *,
        lora: bool = False,
        train_vision: str = "all",
        reference: QwenVL | None = None,
        mesh=None,
        kernel: Kernel = PLAIN,
    ):
        chosen = trainable_filter(lora=lora, train_vision=train_vision)
        graph, self.trainable, self.frozen = nnx.split(model, chosen, ...)
        self.reference = nnx.split(reference, chosen, ...)[1] if reference else None
        self.mesh = mesh
        self.memory = objective.start_memory()
        self.step = Step(
            graph,
            objective,
            keep_gradients(),
            mesh=mesh,
            kernel=kernel,
            vision_trained=train_vision != "none",
            head_trained=not lora,
        )

    def __call__(self, arrays: dict[str, np.ndarray]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        # What is trained and the state of the optimizer are given away (donated).
        trainable = jax.tree.map(jnp.copy, self.trainable)
        state = jax.tree.map(jnp.zeros_like, self.trainable)
        batch = arrays if self.mesh is None else put(arrays, self.mesh)
        _, gradients, self.memory, metrics = self.step.train(
            trainable, state, self.memory, self.frozen, self.reference, batch, branches=branches_of(arrays)
        )
        assert not float(metrics.pop("skipped"))
        return {k: float(v) for k, v in metrics.items() if k not in MARGINS}, by_path(gradients)


def branches_of(arrays: dict[str, np.ndarray]) -> int:
    return round_up(max(int(arrays["label_branches"].max()), 1), 4)


def keep_gradients() -> optax.GradientTransformation:
    """An "optimizer" that changes nothing and whose state is the last gradient."""
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda gradients, state, parameters=None: (zeros(gradients), gradients))


def by_path(state: nnx.State) -> dict[str, np.ndarray]:
    """Arrays on the host under their dotted paths."""
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def assert_same_arrays(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float) -> None:
    """Each array within `rtol` of the other's norm, but for the noise of float32 sums in arrays of next to nothing."""
    assert sorted(ours) == sorted(expected)
    whole = np.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in expected.values()))
    for name, array in expected.items():
        error = np.linalg.norm((ours[name] - array).astype(np.float64))
        allowed = rtol * np.linalg.norm(array.astype(np.float64)) + 1e-8 * whole
        assert error <= allowed, f"{name}: off by {error:.3g}, norm {np.linalg.norm(array):.3g}"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
