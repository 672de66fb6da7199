"""A run's batches: the corpus, what of it the pair rule and the lengths leave, and what is held out."""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from silkie_jax.corpus import CorpusReader, split
from silkie_jax.corpus.imitation import check_imitate, imitate_name
from silkie_jax.corpus.pairs import check_rule
from silkie_jax.errors import UserError
from silkie_jax.hardware.mesh import batch_shards, local_sequences, platform_of
from silkie_jax.models.qwen_vl.config import QwenVLConfig
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference.batches import BatchSource, Features, ReferenceLogps, RowOptions
from silkie_jax.preference.condition import read_condition
from silkie_jax.preference.grid import Grid
from silkie_jax.preference.layout import SIZES, TOO_LONG, UNUSABLE, lay_out
from silkie_jax.preference.plan import Plan
from silkie_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Skipped:
    """Records that training does not see, or not whole."""

    unusable: int  # without anything to train on
    lacking: str  # what those lack
    too_long: list[str]  # ids whose images leave no room for a response
    cut: dict[str, int]  # id -> tokens left out

    def write(self, path: Path) -> None:
        """Lists them, one JSON object a line."""
        lines = [{"id": i, "what": "left out: images and prompt exceed max_length"} for i in self.too_long]
        lines += [{"id": i, "what": f"cut: {n} tokens beyond max_length left out"} for i, n in self.cut.items()]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

    def __str__(self) -> str:
        parts = [f"{self.unusable} without {self.lacking}"] if self.unusable else []
        parts += [f"{len(self.too_long)} too long"] if self.too_long else []
        parts += [f"{len(self.cut)} cut to max_length"] if self.cut else []
        return ", ".join(parts) or "nothing left out"


@dataclasses.dataclass(frozen=True)
class Data:
    """The batches of training, and of the held-out instructions where there are any."""

    train: BatchSource
    evaluation: BatchSource | None
    skipped: Skipped

    def use_reference(self, reference: ReferenceLogps | None, null: ReferenceLogps | None = None) -> None:
        """Lets batches carry stored log-probabilities, also those under the null image."""
        for source in (self.train, self.evaluation):
            if source is not None:
                source.reference, source.null_reference = reference, null

    def number_pairs(self, wanted: bool) -> None:
        """Lets batches say in which order their pairs come, where that matters."""
        for source in (self.train, self.evaluation):
            if source is not None:
                source.numbers_pairs = wanted

    def use_features(self, features: Features) -> None:
        """Lets batches carry stored features in the place of images."""
        for source in (self.train, self.evaluation):
            if source is not None:
                source.features = features


def row_options(config: TrainConfig, corpus: CorpusReader) -> RowOptions:
    """What rows hold, and their limits. Without a rule: mean_rating, or the given pairs of a corpus without ratings.

    Raises:
      UserError: the corpus cannot serve the rule or the condition, or has no ratings to find the best response by.
    """
    rule = None
    if config.imitate:
        check_imitate(config.imitate, corpus.aspects)
    if config.imitate is None or config.imitate == "chosen":
        rule = config.pair_rule or ("mean_rating" if corpus.aspects else "given")
        check_rule(rule, corpus.aspects)
    condition = read_condition(config.condition, corpus.aspects) if config.condition else None
    lengths = config.max_length, config.max_prompt_length
    return RowOptions(rule, config.objective, *lengths, config.imitate or "chosen", condition)


def open_data(config: TrainConfig, mesh: Mesh, corpus: CorpusReader, tokenizer: Tokenizer) -> Data:
    """Holds the evaluation split out and keeps the records that the rule gives something to train on.

    Raises:
      UserError: nothing is left.
    """
    options = row_options(config, corpus)
    layout = lay_out(corpus, partial(options.row, tokenizer), options.key(corpus, tokenizer), config.workers)
    sizes = layout.sizes
    usable = sizes[:, 0] > TOO_LONG
    train, held = (some[usable[some]] for some in split(corpus.index, config.evaluation_fraction, config.seed))
    skipped = _skipped(corpus, sizes, options)
    if not len(train):
        choice = f"imitate {options.imitate}" if options.rule is None else f"pair_rule {options.rule!r}"
        why = f"under {choice} ({skipped})"
        if len(held):
            why = f"beside those that evaluation_fraction {config.evaluation_fraction} holds out ({skipped})"
        raise UserError(f"corpus {config.corpus}: no record to train on {why}")
    make = partial(
        BatchSource,
        corpus,
        tokenizer=tokenizer,
        options=options,
        image_size=QwenVLConfig.from_folder(config.model).visual.image_size,
        local=partial(local_sequences, mesh),
        layout=layout,
    )
    evaluation = None
    if len(held):
        held = held[np.argsort(sizes[held, 0], kind="stable")]  # so that little of a batch is padding
        plan = Plan(sizes[held], config.batch_rows, seed=None)
        evaluation = make(held, make_grid(config, mesh, plan, accumulate=1))
    plan = Plan(sizes[train], config.batch_rows * config.accumulate, config.batch_pairs, config.seed)
    return Data(make(train, make_grid(config, mesh, plan, config.accumulate)), evaluation, skipped)


def make_grid(config: TrainConfig, mesh: Mesh, plan: Plan, accumulate: int) -> Grid:
    """The forward passes of a plan's steps on a mesh.

    Raises:
      UserError: rows are longer than `batch_tokens` allows.
    """
    return Grid(
        plan,
        rows=config.batch_rows,
        accumulate=accumulate,
        shards=batch_shards(mesh),
        pack=config.pack,
        tokens=config.batch_tokens,
        fine=platform_of(mesh) == "gpu",
    )


def _skipped(corpus: CorpusReader, sizes: Int[np.ndarray, "R 6"], options: RowOptions) -> Skipped:
    tokens, cut = sizes[:, 0], sizes[:, SIZES.index("cut")]
    ids = [row.id for row in corpus.index]
    lacking = {"all": "a response", "best": "a rated response"}.get(imitate_name(options.imitate), "a pair")
    if isinstance(options.imitate, Mapping) and "at_least" in options.imitate:
        lacking += f" of at least {options.imitate['at_least']:g}"
    if options.condition is not None:
        lacking += " with all ratings of the condition"
    return Skipped(
        unusable=int((tokens == UNUSABLE).sum()),
        lacking=lacking,
        too_long=[ids[i] for i in np.flatnonzero(tokens == TOO_LONG)],
        cut={ids[i]: int(cut[i]) for i in np.flatnonzero((tokens > TOO_LONG) & (cut > 0))},
    )
