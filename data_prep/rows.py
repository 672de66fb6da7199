"""What a run's database tells, row by row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Instruction:
    """One instruction: `images` are SHA-256 of files added to the run, `number` its place in the run, from 1."""

    id: str
    prompt: str
    images: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    source: str = ""
    licence: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0


@dataclass(frozen=True)
class StoredResponse:
    """One response: `agent` is the pool's name of the model, `model` the name that its server reported."""

    slot: int
    agent: str
    model: str
    text: str
    outcome: str
    output_tokens: int | None


@dataclass(frozen=True)
class JudgeReply:
    """One settled request to a judge.

    Attributes:
        judge: its name in the configuration.
        order: which of the orders in which the responses were shown, from 0.
        arrangement: slots of the responses as shown: "Text n" is the response of slot `arrangement[n - 1]`.
        text: the raw reply; "" where there is none.
        outcome: a value of `replies.Outcome` or of the parser; "ok" for a usable reply.
        finish_reason, model: as reported.
    """

    judge: str
    order: int
    arrangement: tuple[int, ...]
    text: str
    outcome: str
    finish_reason: str
    model: str


@dataclass(frozen=True)
class Gathered:
    """All there is of an instruction: responses by slot, replies by judge and order."""

    instruction: Instruction
    responses: tuple[StoredResponse, ...]
    replies: tuple[JudgeReply, ...]


@dataclass(frozen=True)
class Spending:
    """What one agent did in one stage.

    Attributes:
        requests: state -> count.
        attempts: outcome -> count; "in flight" for those that wait in a batch or were cut off.
        input_tokens, output_tokens, cost: as reported by the server; cost in USD by the configured price.
        at_risk: USD that attempts without a bill (cut off, timed out) may have cost at most.
        seconds: mean time of an attempt that was answered live.
        models: names that the server reported.
    """

    stage: str
    agent: str
    requests: Mapping[str, int]
    attempts: Mapping[str, int]
    input_tokens: int
    output_tokens: int
    cost: float
    at_risk: float
    seconds: float
    models: tuple[str, ...]
