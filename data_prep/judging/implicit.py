"""Judges of kind `implicit`: how much more probable training has made each response (SPA, arXiv 2406.04412, eq. 7).

Two models score every response of an instruction by its summed log-probability: the policy, and the model from which
all training started. The difference is the reward that is implicit in DPO's policy (without the factor beta, which
changes no order). A policy that is the start itself gives 0 to all: all tie.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.judging.aggregate import Judgement
from data_prep.judging.one_aspect import OneAspect
from data_prep.run import RATE, Gathered, JudgeReply, Run
from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.agents import Agent, check_agent
from silkie_jax.endpoints.attempts import Request, Verdict, new_request
from silkie_jax.endpoints.client import LOGPROBS
from silkie_jax.endpoints.journal import Statement
from silkie_jax.endpoints.messages import compose_texts, image_tokens
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.errors import UserError
from silkie_jax.yaml_files import make

ASPECT = "Implicit reward"
SIDES = ("policy", "start")


@dataclass
class Side:
    """One of the two models: a folder that silkie_jax serves, or a `silkie serve` that runs already."""

    local: str | None = None  # a converted or a Hugging Face folder
    adapter: str | None = None  # a PEFT folder for `local`
    dtype: str = "bfloat16"  # of `local`
    base_url: str | None = None  # instead of `local`
    model: str = ""  # the name that the server at base_url knows it by
    api_key_env: str | None = None
    concurrency: int = 16
    timeout: float = 600.0


@dataclass
class Judge:
    """The policy, and the model that it is measured against."""

    policy: Side = field(default_factory=Side)
    start: Side = field(default_factory=Side)
    kind: str = "implicit"
    name: str = "implicit"


class ImplicitJudge:
    """How it asks; see `kinds.Asking`. One request an instruction and side, to `/v1/logprobs`."""

    free = ()

    def __init__(self, given: Mapping[str, Any], path: str | os.PathLike[str]):
        self.judge = make(given, Judge, str(path))
        self.name = self.judge.name
        self.agents = {filed(self.name, side): _agent(getattr(self.judge, side), path, f"{side}.") for side in SIDES}
        self.routes = dict.fromkeys(self.agents, LOGPROBS)

    def settings(self) -> dict[str, Any]:
        return asdict(self.judge)

    def requests(self, run: Run, gathered: Gathered, skipped: Counter[str]) -> Iterator[Statement]:
        instruction, responses = gathered.instruction, gathered.responses
        texts = [response.text for response in responses]
        sizes = [run.image_size(sha256) for sha256 in instruction.images]
        for name, agent in self.agents.items():
            body = compose_texts(agent, instruction.prompt, instruction.images, instruction.history, texts)
            slots = [response.slot for response in responses]
            yield new_request(RATE, instruction.number, name, 0, slots, body, image_tokens(agent, sizes))

    def review(self, request: Request, reply: EndpointReply, number: int) -> Verdict:
        """What the server refuses stays refused: a row that is too long for its context, for one."""
        if reply.outcome != outcomes.OK:
            return Verdict(reply.outcome, "failed")
        found = _logprobs(reply.text, json.loads(request.arrangement or "[]"))
        return Verdict(outcomes.OK, "ok") if found else Verdict("unparsable", "failed")


@dataclass(frozen=True)
class ImplicitReading(OneAspect):
    """What its replies come to; see `kinds.Reading`."""

    aspect = ASPECT
    judge: str

    @classmethod
    def of(cls, judge: str, kept: Mapping[str, Any]) -> "ImplicitReading":
        return cls(judge)

    @staticmethod
    def kept(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": "implicit"}

    @property
    def asked(self) -> tuple[str, ...]:
        return tuple(filed(self.judge, side) for side in SIDES)

    def judgements(self, gathered: Gathered) -> list[Judgement]:
        replies = {reply.judge: reply for reply in gathered.replies if reply.judge in self.asked}
        if not replies:
            return []
        found = [_scored(replies.get(name)) for name in self.asked]
        slots = [response.slot for response in gathered.responses]
        rewards = [found[0].get(slot, math.nan) - found[1].get(slot, math.nan) for slot in slots]
        why = [
            f"no log-probabilities of the {side} ({replies[name].outcome if name in replies else 'not asked'})"
            for side, name, scores in zip(SIDES, self.asked, found, strict=True)
            if not scores
        ]
        lacks = sum(map(math.isnan, rewards))
        kind = "complete" if not lacks else "failed" if why else "missing"
        note = "; ".join(why) or (f"{lacks} responses came after it was asked" if lacks else "")
        shown, empty = tuple(range(len(slots))), {ASPECT: [""] * len(slots)}
        return [Judgement(self.judge, 0, kind, shown, {ASPECT: rewards}, empty, note)]


def filed(judge: str, side: str) -> str:
    """The name under which the replies of one side are filed."""
    return f"{judge}: {side}"


def _agent(side: Side, path: str | os.PathLike[str], key: str) -> Agent:
    if (side.local is None) == (side.base_url is None):
        raise UserError(
            f"{path}: {key}local must name a model's folder, or {key}base_url a `silkie serve` that runs; one of both"
        )
    if side.adapter is not None and side.local is None:
        raise UserError(f"{path}: {key}adapter has no meaning with base_url: serve the model with it")
    fields = {name: value for name, value in asdict(side).items() if value is not None}
    fields["model"] = side.model or ("" if side.local else "default")
    agent = Agent(**fields, expected_tokens=0, max_tokens=1)
    check_agent(agent, path, key)
    agent.model = side.model
    return agent


def _scored(reply: JudgeReply | None) -> dict[int, float]:
    """Slot -> log-probability; {} where there is no usable reply."""
    return _logprobs(reply.text, reply.arrangement) if reply and reply.outcome == outcomes.OK else {}


def _logprobs(text: str, slots: Any) -> dict[int, float]:
    """Slot -> log-probability of the text that stood there; {} unless there is a number for each."""
    try:
        values = [float(entry["logprob"]) for entry in json.loads(text)]
    except (ValueError, TypeError, KeyError):
        return {}
    sound = len(values) == len(slots) and all(map(math.isfinite, values))
    return dict(zip(slots, values, strict=True)) if sound else {}
