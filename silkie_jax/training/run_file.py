"""run.json: what a run is known by, wherever its folder and what it reads are moved to.

id                                    of the run; wandb knows it by this
corpus, tokenizer, weights, adapter   fingerprints of what it began with (adapter: null where it drew its own)
reference                             of the adapter that its stored reference has (null: none, or there is no such)
"""

import json
import os
import uuid
from pathlib import Path

from silkie_jax.corpus import CorpusReader
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.scoring.fingerprints import adapter_fingerprint, weights_fingerprint
from silkie_jax.scoring.store import Identity
from silkie_jax.training.config import TrainConfig

RUN_FILE = "run.json"
CONDITION_FILE = "condition.txt"
"""What the policy is to be asked below every question, where it is trained with a condition."""
Contents = dict[str, str | None]  # fingerprints by name


def read_contents(corpus: CorpusReader, tokenizer: Tokenizer) -> Contents:
    """Fingerprints of what is known before gigabytes are read."""
    return {"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}


def loaded_contents(config: TrainConfig, policy: QwenVL, tower: bytes = b"") -> Contents:
    """Fingerprints of the weights and the adapter that a run starts from; every process of several must call this.

    `tower` are the checksums of the vision tower where the run needs none.
    """
    return {
        "weights": weights_fingerprint(policy, tower=tower),
        "adapter": adapter_fingerprint(policy) if config.adapter else None,
    }


def check_contents(run: Path, config: TrainConfig, now: Contents) -> None:
    """Refuses to continue a run with other contents, by name. A run that an earlier version began knows none.

    Raises:
      UserError: what has changed.
    """
    began = _read(run)
    where = {
        "corpus": f"the corpus at {config.corpus} has",
        "tokenizer": f"the tokenizer of {config.model} has",
        "weights": f"the weights of {config.model} have",
        "adapter": f"the adapter at {config.adapter} has",
    }
    for name, fingerprint in now.items():
        if began.get(name, fingerprint) != fingerprint:
            raise UserError(f"{run}: {where[name]} changed since this run began; put it back, or use a new run_dir")


def save_contents(run: Path, contents: Contents) -> None:
    """Writes run.json where it is not there yet, whole or not at all."""
    path = run / RUN_FILE
    if path.exists():
        return
    # The id that earlier versions gave to a run that logged to wandb; another would begin a second one.
    name = run.absolute().name if (run / "wandb").is_dir() else uuid.uuid4().hex[:16]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"id": name, **contents}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def as_it_began(depends: Identity, run: Path, done: int) -> Identity:
    """What a run's stored reference depends on: its adapter counts, unless the run began when it did not."""
    if done and not _read(run).get("reference"):
        return {name: value for name, value in depends.items() if name != "adapter"}
    return depends


def run_id(run: Path) -> str:
    """The id of a run that has begun."""
    return _read(run)["id"]


def _read(run: Path) -> dict[str, str]:
    path = run / RUN_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise UserError(f"{path}: damaged ({e}); remove it to continue with what is there now") from None
