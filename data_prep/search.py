"""Sentence search: a pool's model answers by a tree of sentences instead of one text (CSR, arXiv 2405.14622).

A request asks for several continuations of a text so far, an open turn of the assistant, with their log-probabilities;
another asks a CLIP server for their likeness to the image, where that selects. All are in the journal as any request
is; the tree, and the responses that it makes, are derived from their replies (`sentences.grow`).
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from data_prep.run import SEARCH, Instruction, Run, candidates_in, search_of, similar_name, similarities_in
from data_prep.sentences import ROOT, SELECTIONS, Candidate, grow
from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.agents import Agent, check_agent
from silkie_jax.endpoints.attempts import Request, Verdict, new_request
from silkie_jax.endpoints.client import CANDIDATES, SIMILARITY, Route
from silkie_jax.endpoints.journal import Statement
from silkie_jax.endpoints.messages import compose, compose_texts, image_tokens
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.errors import UserError


@dataclass
class SearchConfig:
    """How a pool's model searches."""

    name: str = "sentences"
    candidates: int = 5  # that continue a text
    best: int = 1  # of a level's open candidates, how many of the best are continued
    worst: int = 2  # and how many of the worst
    until: str = "."  # ends a sentence
    max_tokens: int = 70  # of a sentence
    max_characters: int = 1024  # of a response
    select_by: str = "reward"  # with CLIP's likeness, as in the paper; or language, as in the release
    clip_weight: float = 0.9  # of the likeness in the reward
    similarity: Agent | None = None  # the CLIP server, where select_by is reward


def check_search(search: SearchConfig, agent: Agent, path: str | os.PathLike[str], key: str) -> None:
    """Refuses a search that cannot be meant; `path` and `key` say where it stands.

    Raises:
        UserError: one line that names the file, the key and the mend.
    """

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(f"{path}: {key}{message}")

    need(search.name == "sentences", f"name: there is no search {search.name!r}; there is sentences")
    for name in ("candidates", "best", "max_tokens", "max_characters"):
        need(getattr(search, name) >= 1, f"{name} must be at least 1, not {getattr(search, name)}")
    need(search.worst >= 0, f"worst must be at least 0, not {search.worst}")
    need(bool(search.until.strip()), "until must be a text that ends a sentence")
    need(
        search.select_by in SELECTIONS,
        f"select_by: {search.select_by!r} is unknown; choose {' or '.join(SELECTIONS)}",
    )
    need(0 <= search.clip_weight <= 1, f"clip_weight must lie between 0 and 1, not {search.clip_weight:g}")
    reward = search.select_by == "reward"
    need(
        (search.similarity is not None) == reward,
        "similarity: name the CLIP server that the reward needs, or write select_by: language"
        if reward
        else "similarity is asked in select_by: reward only: leave it out",
    )
    if search.similarity is not None:
        need(
            search.similarity.local is None,
            "similarity.local has no meaning: start a CLIP server and name its base_url",
        )
        search.similarity.model = search.similarity.model or "clip"
        check_agent(search.similarity, path, f"{key}similarity.")
    need(agent.sampling.get("temperature") != 0, "candidates are all the same at temperature 0: give the model one")
    for name in ("seed", "logprobs", "stop"):
        need(name not in agent.sampling, f"sampling.{name} is set by search: leave it out")


class Searcher:
    """The search stage of a run: what is asked next, and what a reply leads to.

    Args:
        run: open for writing.
        models: those of the pool that search, by name.
        seed: of the pool.
    """

    def __init__(self, run: Run, models: Mapping[str, tuple[Agent, SearchConfig]], seed: int):
        self._run, self._models, self._seed = run, models, seed
        self.agents = {name: agent for name, (agent, _) in models.items()}
        self.routes: dict[str, Route] = dict.fromkeys(models, CANDIDATES)
        for name, (_, config) in models.items():
            if config.similarity is not None:
                self.agents[similar_name(name)] = config.similarity
                self.routes[similar_name(name)] = SIMILARITY
        self._known: dict[tuple[int, str], tuple[dict[int, list[Candidate]], dict[int, list[float]]]] = {}

    def next_requests(self, instruction: Instruction, name: str) -> Iterator[Statement]:
        """Requests that an instruction's tree needs to go on; those that are there already may come again."""
        agent, config = self._models[name]
        replies, likeness = self._replies(instruction.number, name)
        grown = grow(search_of(vars(config)), replies, likeness)
        if not grown.to_ask and not grown.to_compare:
            self._known.pop((instruction.number, name), None)
        sizes = [self._run.image_size(sha256) for sha256 in instruction.images]
        for number, text in grown.to_ask.items():
            body = compose(agent, instruction.prompt, instruction.images, instruction.history)
            body |= {agent.max_tokens_field: config.max_tokens, "n": config.candidates, "logprobs": True}
            body |= {"stop": [config.until], "include_stop_str_in_output": True}
            body["seed"] = _seed(self._seed, instruction.id, name, number)
            if number != ROOT:
                body["messages"].append({"role": "assistant", "content": text})
                body |= {"continue_final_message": True, "add_generation_prompt": False}
            tokens = image_tokens(agent, sizes)
            yield new_request(SEARCH, instruction.number, name, number, None, body, tokens)
        if config.similarity is not None:
            for number, texts in grown.to_compare.items():
                said = [text.strip() for text in texts]
                body = compose_texts(config.similarity, "", instruction.images, (), said)
                tokens = image_tokens(config.similarity, sizes)
                yield new_request(SEARCH, instruction.number, similar_name(name), number, None, body, tokens)

    def go_on(self) -> None:
        """Plans what trees need whose last replies an earlier command left without an answer to them."""
        rows = self._run.db.execute("SELECT DISTINCT instruction, agent FROM requests WHERE stage = ?", (SEARCH,))
        for number, name in rows.fetchall():
            if name in self._models:
                (instruction,) = self._run.instructions(number, number)
                for request in self.next_requests(instruction, name):
                    self._run.db.execute(*request)

    def review(self, name: str, request: Request, reply: EndpointReply, number: int) -> Verdict:
        """A reply that cannot be used ends the tree at its sentence."""
        model = name if name in self._models else name.removesuffix(similar_name(""))
        replies, likeness = self._replies(request.item, model)
        sound = reply.outcome == outcomes.OK
        if name == model:
            replies[request.slot] = candidates_in(reply.text) if sound else []
        else:
            likeness[request.slot] = similarities_in(reply.text) if sound else []
        (instruction,) = self._run.instructions(request.item, request.item)
        return Verdict(reply.outcome, "ok" if sound else "failed", tuple(self.next_requests(instruction, model)))

    def _replies(self, item: int, name: str) -> tuple[dict[int, list[Candidate]], dict[int, list[float]]]:
        """What is known of a tree, kept while it grows: replies are committed a moment after they are reviewed."""
        if (item, name) not in self._known:
            replies: dict[int, list[Candidate]] = {}
            likeness: dict[int, list[float]] = {}
            for agent, number, state, text in self._run.db.execute(
                "SELECT r.agent, r.slot, r.state, coalesce(a.text, '') FROM requests r "
                "JOIN attempts a ON a.id = r.attempt "
                "WHERE stage = ? AND instruction = ? AND r.agent IN (?, ?) AND r.state IN ('ok', 'failed')",
                (SEARCH, item, name, similar_name(name)),
            ):
                if agent == name:
                    replies[number] = candidates_in(text) if state == "ok" else []
                else:
                    likeness[number] = similarities_in(text) if state == "ok" else []
            self._known[item, name] = replies, likeness
        return self._known[item, name]


def _seed(seed: int, id: str, name: str, number: int) -> int:
    """The seed of a request, in [0, 2^31): the same whenever it is asked."""
    return int.from_bytes(hashlib.sha256(f"{seed} {id} {name} {number}".encode()).digest()[:4], "big") >> 1
