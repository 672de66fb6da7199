"""What is asked of the engine, and what comes back."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int, UInt8

from silkie_jax.errors import UserError

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to continue.

    Attributes:
        tokens: ids [T], with a whole span of ids for each image.
        images: uint8 [S, S, 3] each, in the order of their spans.
        max_new_tokens: the most ids of a completion.
        temperature: 0 is greedy.
        top_p: ids are drawn among the most probable whose probabilities add up to it.
        stop: what else than end-of-text ends a completion: ids, or sequences of ids. It is kept.
        seed: of the draws, in [0, 2^32). Sample i draws as a request with seed `sample_seed(seed, i)` would.
        n: completions of the prompt, which is computed once.
    """

    tokens: Sequence[int] | Int[np.ndarray, "T"]
    images: Sequence[UInt8[np.ndarray, "S S 3"]] = ()
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    stop: Sequence[int | Sequence[int]] = ()
    seed: int = 0
    n: int = 1

    @cached_property
    def ids(self) -> Int[np.ndarray, "T"]:
        """The prompt as an array."""
        return np.asarray(self.tokens, np.int32)

    @cached_property
    def image_keys(self) -> tuple[bytes, ...]:
        """What tells images apart: a hash of each one's pixels."""
        return tuple(hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in self.images)


@dataclass(frozen=True)
class Completion:
    """One finished sample of a request.

    Attributes:
        sample: its number, 0 to n - 1.
        tokens: ids up to and with the one that ended it.
        logprobs: of each id, under the model's distribution at temperature 1, in nats.
        top: the most probable (id, log-probability) at each place, if the engine was made with `top_logprobs`.
        finish: `stop`, `length`, or `cancelled`.
    """

    sample: int
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    finish: str


def sample_seed(seed: int, sample: int) -> int:
    """The seed of a request's sample number `sample`; the first one's is the request's own."""
    if not sample:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {sample}".encode()).digest()[:4], "little")


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Refuses options that are out of range.

    Raises:
      UserError: in one line.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 (greedy) or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be in (0, 1], not {top_p}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be in [0, 2**32), not {seed}")


def stop_sequences(stop: int | Iterable[int | Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Single ids and sequences of ids, all as tuples; empty ones never match and are left out.

    Raises:
      UserError: an entry is neither.
    """
    entries = stop if isinstance(stop, Iterable) else [stop]
    sequences = [np.atleast_1d(np.asarray(entry)) for entry in entries]
    for sequence in sequences:
        if sequence.size and (sequence.ndim > 1 or not np.issubdtype(sequence.dtype, np.integer)):
            raise UserError(f"stop must hold ids or sequences of ids, not {sequence.tolist()}")
    return tuple(tuple(sequence.tolist()) for sequence in sequences if sequence.size)
