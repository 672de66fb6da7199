"""Judges of kind `similarity`: how much each sentence of a response looks like the image, by CLIP, and how probable the
model found it (CSR, arXiv 2405.14622).

They rate what a sentence search made: its journal has the sentences, their siblings and their log-probabilities. The
image and all sentences go to a CLIP server, once; what a response is worth is derived from that, as often as one likes,
by the ways of `sentences`. A response that no search made has no rating.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_prep.judging.aggregate import Judgement
from data_prep.judging.one_aspect import OneAspect
from data_prep.run import RATE, Gathered, JudgeReply, Run, similarities_in
from data_prep.sentences import FILTERS, OVERS, REWARDS, Sentence, kept, path_reward, sentence_rewards
from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.agents import Agent, check_agent
from silkie_jax.endpoints.attempts import Request, Verdict, new_request
from silkie_jax.endpoints.client import SIMILARITY
from silkie_jax.endpoints.journal import Statement
from silkie_jax.endpoints.messages import compose_texts, image_tokens
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.errors import UserError
from silkie_jax.yaml_files import make

ASPECT = "Calibrated reward"


@dataclass
class Judge:
    """The CLIP server, and how a reward is derived from its replies."""

    agent: Agent
    kind: str = "similarity"
    name: str = "similarity"
    clip_weight: float = 0.9  # l: of the likeness; the rest is the language's
    reward: str = "rank"  # or raw, the paper's
    over: str = "mean"  # or sum, the paper's, or release
    filter: str = "repetition"  # sentences that do not count: repetition, release or none


class SimilarityJudge:
    """How it asks; see `kinds.Asking`. One request an instruction and searching model, to `/v1/similarity`."""

    free = ("clip_weight", "reward", "over", "filter")  # of the derivation, not of what is asked

    def __init__(self, given: Mapping[str, Any], path: str | os.PathLike[str]):
        judge = make(given, Judge, str(path))

        def need(ok: bool, message: str) -> None:
            if not ok:
                raise UserError(f"{path}: {message}")

        need(judge.agent.local is None, "agent.local: start a CLIP server and name its base_url instead")
        judge.agent.model = judge.agent.model or "clip"
        check_agent(judge.agent, path, "agent.")
        need(0 <= judge.clip_weight <= 1, f"clip_weight must lie between 0 and 1, not {judge.clip_weight:g}")
        for key, known in (("reward", REWARDS), ("over", OVERS), ("filter", FILTERS)):
            value = getattr(judge, key)
            need(value in known, f"{key}: {value!r} is unknown; choose one of {', '.join(known)}")
        self.judge, self.name, self.agents = judge, judge.name, {judge.name: judge.agent}
        self.routes = {judge.name: SIMILARITY}

    def settings(self) -> dict[str, Any]:
        return asdict(self.judge)

    def requests(self, run: Run, gathered: Gathered, skipped: Counter[str]) -> Iterator[Statement]:
        agent, instruction = self.judge.agent, gathered.instruction
        if not gathered.trees or not instruction.images:
            skipped["no tree"] += 1
            return
        sizes = [run.image_size(sha256) for sha256 in instruction.images]
        for order, name in enumerate(sorted(gathered.trees)):
            numbers, texts = _said(gathered.trees[name])
            if texts:
                body = compose_texts(agent, "", instruction.images, (), texts)
                yield new_request(RATE, instruction.number, self.name, order, numbers, body, image_tokens(agent, sizes))

    def review(self, request: Request, reply: EndpointReply, number: int) -> Verdict:
        if reply.outcome != outcomes.OK:
            return Verdict(reply.outcome, "failed")
        wanted = request.arrangement.count(",") + 1 if request.arrangement else 0
        found = similarities_in(reply.text)
        sound = len(found) == wanted and all(map(math.isfinite, found))
        return Verdict(outcomes.OK, "ok") if sound else Verdict("unparsable", "failed")


@dataclass(frozen=True)
class SimilarityReading(OneAspect):
    """What its replies come to; see `kinds.Reading`."""

    aspect = ASPECT
    judge: str
    clip_weight: float
    reward: str
    over: str
    filter: str

    @classmethod
    def of(cls, judge: str, kept: Mapping[str, Any]) -> "SimilarityReading":
        return cls(judge, **{key: value for key, value in kept.items() if key != "name"})

    @staticmethod
    def kept(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": "similarity"} | {key: settings[key] for key in SimilarityJudge.free}

    @property
    def asked(self) -> tuple[str, ...]:
        return (self.judge,)

    def judgements(self, gathered: Gathered) -> list[Judgement]:
        replies = {reply.order: reply for reply in gathered.replies if reply.judge == self.judge}
        if not replies:
            return []
        rewards: dict[str, dict[int, float]] = {}
        why = []
        for order, name in enumerate(sorted(gathered.trees)):
            likeness = _likeness(replies.get(order))
            counting = kept(gathered.trees[name], self.filter)
            if any(one.text and one.number not in likeness for one in counting):
                why.append(f"no likeness of the sentences of {name}")
                continue
            rewards[name] = sentence_rewards(counting, likeness, clip_weight=self.clip_weight, reward=self.reward)
        values = [self._worth(gathered.way(one), rewards.get(one.agent, {})) for one in gathered.responses]
        known = any(not math.isnan(value) for value in values)
        kind = "failed" if not known and why else "missing" if why else "complete"
        note = "; ".join(why) or ("" if known else "no response is left by the filter, or none was searched for")
        shown, empty = tuple(range(len(values))), {ASPECT: [""] * len(values)}
        return [Judgement(self.judge, 0, kind, shown, {ASPECT: values}, empty, note)]

    def _worth(self, way: Sequence[Sentence] | None, rewards: Mapping[int, float]) -> float:
        """NaN of a response that no search made, and of one with a sentence that does not count."""
        if way is None or any(one.text and one.number not in rewards for one in way):
            return math.nan
        return path_reward(way, rewards, self.over)


def _said(tree: Sequence[Sentence]) -> tuple[list[int], list[str]]:
    """Numbers and texts of the sentences that say something."""
    said = [one for one in tree if one.text.strip()]
    return [one.number for one in said], [one.text.strip() for one in said]


def _likeness(reply: JudgeReply | None) -> dict[int, float]:
    """Number of a sentence -> 100 x cosine; {} where there is no usable reply."""
    if reply is None or reply.outcome != outcomes.OK:
        return {}
    found = similarities_in(reply.text)
    return dict(zip(reply.arrangement, found, strict=True)) if len(found) == len(reply.arrangement) else {}
