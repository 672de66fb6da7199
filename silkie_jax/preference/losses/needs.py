"""What a loss can ask of the step beside the log-probabilities under policy and reference."""

import dataclasses
from typing import Literal, NamedTuple

from silkie_jax.models.qwen_vl.null_image import NullImage
from silkie_jax.preference.logprobs import Through
from silkie_jax.preference.losses.memory import Memory


class Pass(NamedTuple):
    """A forward pass over the rows: of which weights, with which image (None: its own)."""

    of: Literal["policy", "reference"]
    image: NullImage | None = None

    def __str__(self) -> str:
        return f"{self.of} with {self.image or 'own image'}"


POLICY, REFERENCE = Pass("policy"), Pass("reference")


class Mix(NamedTuple):
    """Log-probabilities under scores s + factor x (s - those of `against`), s the policy's with its own image."""

    against: Pass
    factor: float
    through: Through


@dataclasses.dataclass(frozen=True)
class Needs:
    """What of `Pairs` a loss reads.

    Attributes:
      null: the pass whose log-probabilities are the pairs' `null`.
      mixed: what their `mixed` is.
      memory: what says their `threshold`.
      progress: whether it reads how far the run is.
    """

    null: Pass | None = None
    mixed: Mix | None = None
    memory: Memory | None = None
    progress: bool = False

    @property
    def passes(self) -> frozenset[Pass]:
        """Beside policy and reference with their own images, which every objective over pairs makes for its metrics."""
        more = (self.null, self.mixed.against if self.mixed else None)
        return frozenset(one for one in more if one is not None) - {POLICY, REFERENCE}
