"""`silkie reference`: the reference's log-probability of every response, stored beside the corpus."""

from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from tqdm import tqdm

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.corpus import CorpusReader
from silkie_jax.hardware.distributed import together
from silkie_jax.hardware.kernel import sound_kernel
from silkie_jax.hardware.mesh import make_mesh, sharding_of
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.preference.rows import ROW_FORM
from silkie_jax.scoring.fingerprints import adapter_fingerprint, weights_fingerprint
from silkie_jax.scoring.scorer import Scorer
from silkie_jax.scoring.store import Identity, ReferenceStore


class MeshSizes(Protocol):
    """Devices along each axis (hardware/mesh.py)."""

    data: int
    fsdp: int
    tensor: int


class Settings(Protocol):
    """What a training configuration says about its reference: what it depends on, and how it is computed."""

    model: str
    adapter: str | None
    corpus: str
    dtype: str
    max_length: int
    max_prompt_length: int | None
    batch_rows: int
    batch_tokens: int | None
    workers: int
    attention: str

    @property
    def mesh(self) -> MeshSizes: ...


def compute_reference(config: Settings) -> Path:
    """Computes what is missing of the reference's log-probabilities and returns their folder.

    The reference is the policy as training starts: the model, with the adapter that the configuration names, if any. (A
    new adapter changes nothing yet.) What is done is kept; the same command continues.
    """
    main = jax.process_index() == 0
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with together():
        corpus, tokenizer = CorpusReader(config.corpus), Tokenizer.from_folder(config.model)
        where = partial(sharding_of, mesh)
        model = load_model(config.model, dtype=config.dtype, adapter=config.adapter, sharding_of=where)
    store = ReferenceStore(corpus.path, identity(config, model, tokenizer, corpus), len(corpus))
    scorer = Scorer(
        model,
        tokenizer,
        mesh,
        batch_rows=config.batch_rows,
        batch_tokens=config.batch_tokens,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        workers=config.workers,
        kernel=sound_kernel(config.attention, config.dtype, mesh, say=print if main else lambda line: None),
    )
    missing = store.missing()
    if jax.process_count() > 1:  # all hosts must take the same parts, whatever each sees of a shared disk
        flags = jnp.array([part in missing for part in range(store.parts)])
        missing = jnp.flatnonzero(multihost_utils.broadcast_one_to_all(flags)).tolist()
    rows = sum(len(store.range(part)) for part in missing)
    with tqdm(total=rows, desc="reference", unit="row", disable=not main) as bar:
        for part in missing:
            scored = scorer(corpus.batch(store.range(part)))
            with together():
                if main:
                    store.write(part, [s.logps for s in scored])
            bar.update(len(scored))
    return store.folder


def identity(config: Settings, model: QwenVL, tokenizer: Tokenizer, corpus: CorpusReader) -> Identity:
    """What the reference's log-probabilities depend on; a new adapter of `model` does not count."""
    adapter = {"adapter": adapter_fingerprint(model) or ""} if config.adapter else {}
    return adapter | {
        "weights": weights_fingerprint(model, jnp.dtype(config.dtype)),
        "dtype": config.dtype,
        "tokenizer": tokenizer.fingerprint,
        "rows": f"{ROW_FORM}, max_length {config.max_length}, max_prompt_length {config.max_prompt_length}",
        "corpus": corpus.fingerprint,
    }
