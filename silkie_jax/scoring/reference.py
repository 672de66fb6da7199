"""`silkie reference`: the reference's log-probability of every response, stored beside the corpus."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.corpus import CorpusReader
from silkie_jax.hardware.distributed import together
from silkie_jax.hardware.kernel import sound_kernel
from silkie_jax.hardware.mesh import make_mesh, sharding_of
from silkie_jax.hardware.products import check_compute
from silkie_jax.models.qwen_vl.model import PARTS, QwenVL
from silkie_jax.models.qwen_vl.null_image import NullImage
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference.rows import ROW_FORM
from silkie_jax.scoring.features import find_features
from silkie_jax.scoring.fingerprints import adapter_fingerprint, tower_checksums, weights_fingerprint
from silkie_jax.scoring.scorer import Scorer
from silkie_jax.scoring.settings import Settings, missing_parts, numerics
from silkie_jax.scoring.store import Identity, ReferenceStore


def compute_reference(config: Settings) -> Path:
    """Computes what is missing of the reference's log-probabilities and returns their folder.

    The reference is the policy as training starts: the model, with the adapter that the configuration names, if any. (A
    new adapter changes nothing yet.) Where the loss needs them, those with the null image are computed, too (V-DPO).
    What is done is kept; the same command continues.
    """
    main = jax.process_index() == 0
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    where, features, tower, parts = partial(sharding_of, mesh), None, b"", PARTS
    with together():
        check_compute(config.compute, mesh)
        corpus, tokenizer = CorpusReader(config.corpus), Tokenizer.from_folder(config.model)
        if config.features == "precomputed":
            tower = tower_checksums(config.model, config.dtype, config.dtype, where, config.codes).computed
            features, parts = find_features(config, corpus, tower), ("language",)
        model = load_model(
            config.model,
            dtype=config.dtype,
            adapter=config.adapter,
            sharding_of=where,
            parts=parts,
            quantize=config.codes,
        )
        if features is not None:
            features.keep_nulls(config, model, mesh)
    make_scorer = partial(
        Scorer,
        model,
        tokenizer,
        mesh,
        batch_rows=config.batch_rows,
        batch_tokens=config.batch_tokens,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        workers=config.workers,
        kernel=sound_kernel(config.attention, config.dtype, mesh, say=print if main else lambda line: None),
        features=features,
    )
    depends, null = identity(config, model, tokenizer, corpus, tower), config.stored_null_image
    store = ReferenceStore(corpus.path, depends, len(corpus))
    _complete(store, make_scorer(), corpus, "reference")
    if null:
        under = ReferenceStore(corpus.path, under_null(depends, null), len(corpus))
        _complete(under, make_scorer(null=null), corpus, f"reference with {null} image")
    return store.folder


def _complete(store: ReferenceStore, scorer: Scorer, corpus: CorpusReader, what: str) -> None:
    """Computes the parts that a store lacks."""
    main = jax.process_index() == 0
    missing = missing_parts(store)
    rows = sum(len(store.range(part)) for part in missing)
    with tqdm(total=rows, desc=what, unit="row", disable=not main) as bar:
        for part in missing:
            scored = scorer(corpus.batch(store.range(part)))
            with together():
                if main:
                    store.write(part, [s.logps for s in scored])
            bar.update(len(scored))


def under_null(depends: Identity, null: NullImage) -> Identity:
    """What log-probabilities depend on that are taken with the null image in the place of every image."""
    return {**depends, "image": str(null)}


def identity(
    config: Settings, model: QwenVL, tokenizer: Tokenizer, corpus: CorpusReader, tower: bytes = b""
) -> Identity:
    """What the reference's log-probabilities depend on; a new adapter of `model` does not count.

    `tower` are the checksums of a vision tower that `model` lacks: stored features change nothing.
    """
    adapter = {"adapter": adapter_fingerprint(model) or ""} if config.adapter else {}
    return (
        adapter
        | numerics(config)
        | {
            "weights": weights_fingerprint(model, jnp.dtype(config.dtype), tower),
            "dtype": config.dtype,
            "tokenizer": tokenizer.fingerprint,
            "rows": f"{ROW_FORM}, max_length {config.max_length}, max_prompt_length {config.max_prompt_length}",
            "corpus": corpus.fingerprint,
        }
    )
