"""Who answers: the models of a pool and the judges, each an endpoint with its own form, price and limits."""

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import MISSING

from data_prep.config import load_yaml
from silkie_jax.errors import UserError

DRAWS = ("balanced", "random")
_ENVIRONMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SET_ELSEWHERE = {
    "model": "model",
    "messages": "prompt, system and the instructions",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens with max_tokens_field",
    "response_format": "form: json of a judge",
    "n": "models_per_instruction",
    "stream": "nothing: replies are read whole",
}


@dataclass
class Price:
    """USD for a million tokens; `batch` is what the Batch API charges of it."""

    input: float = MISSING
    output: float = MISSING
    batch: float = 0.5


@dataclass
class Agent:
    """A model behind an OpenAI-compatible endpoint, and how to ask it.

    The request's content is `system`, earlier turns, then the images and `prompt` with `{prompt}` in its place.
    """

    model: str = ""  # the name that the endpoint knows it by
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str | None = None  # the environment variable that holds the key; None: the endpoint asks for none
    local: str | None = None  # instead of an endpoint: a folder that silkie_jax loads, served by a process of its own
    adapter: str | None = None  # a PEFT folder for `local`
    dtype: str = "bfloat16"  # of `local`
    system: str | None = None
    prompt: str = "{prompt}"
    images_first: bool = True
    image_detail: str | None = None  # low, high or auto; None: not sent
    max_tokens: int = 1024  # of the reply
    max_tokens_field: str = "max_tokens"  # newer OpenAI models want max_completion_tokens
    sampling: dict[str, Any] = field(default_factory=dict)  # sent as they are: temperature, top_p, seed, ...
    price: Price | None = None  # None: unknown, which a budget does not accept
    weight: float = 1.0  # how often it is drawn, in proportion to the others
    requests_per_minute: int | None = None  # None: as the server's headers say
    tokens_per_minute: int | None = None
    concurrency: int = 16
    timeout: float = 120.0  # seconds for one attempt
    attempts: int = 5  # for errors that pass; a rate limit does not count
    patience: float = 1800.0  # seconds without any answer after which the run stops
    batch: bool = True  # whether --batch may use its Batch API; otherwise it is asked live all the same
    batch_lines: int = 50_000  # of a file at most
    batch_bytes: int = 200_000_000
    image_tokens: int | None = None  # for estimates; None: OpenAI's rule of tiles
    expected_tokens: int = 300  # of a reply, for the estimate before there are any
    serves: str = ""  # a note: what stands behind the name today

    @property
    def free(self) -> bool:
        return self.local is not None

    def cost(self, input_tokens: float, output_tokens: float, batch: bool = False) -> float:
        """USD by the configured price; 0 where there is none."""
        if self.price is None:
            return 0.0
        factor = self.price.batch if batch else 1.0
        return factor * (input_tokens * self.price.input + output_tokens * self.price.output) / 1e6


@dataclass
class Pool:
    """The models that answer, and how they are drawn for an instruction."""

    models: dict[str, Agent] = MISSING
    models_per_instruction: int = 4
    draw: str = "balanced"  # every model equally often (by `weight`), or at random
    replace_failed: bool = True  # a model that refuses at its endpoint or rejects the request makes room for another
    seed: int = 0


@dataclass
class Judge:
    """Who rates, by which rubric, in which orders."""

    agent: Agent = MISSING
    name: str = ""  # by default the model's
    rubric: str = "vlfeedback"  # a rubric of this project, or a file
    form: str = "text"  # of the reply: text, or json where the endpoint supports structured output
    orders: int = 1  # orders of the responses that are rated and averaged; as many as responses: each at every place
    seed: int = 0
    parse_attempts: int = 2  # requests for a reply that can be parsed


def load_pool(path: str | os.PathLike[str]) -> Pool:
    """Reads and checks a pool.

    Raises:
        UserError: one line that names the file, the key and the mend.
    """
    pool = load_yaml(path, Pool)
    _need(path, bool(pool.models), "models is empty: name at least one model")
    _need(path, all(map(str.strip, pool.models)), "models: a name is empty")
    _need(path, pool.draw in DRAWS, f"draw: {pool.draw!r} is unknown; choose one of {', '.join(DRAWS)}")
    _need(
        path,
        1 <= pool.models_per_instruction <= len(pool.models),
        f"models_per_instruction is {pool.models_per_instruction}, but there are {len(pool.models)} models",
    )
    for name, agent in pool.models.items():
        _check_agent(agent, path, f"models.{name}.")
    return pool


def load_judge(path: str | os.PathLike[str]) -> Judge:
    """Reads and checks a judge.

    Raises:
        UserError: as `load_pool`.
    """
    judge = load_yaml(path, Judge)
    _check_agent(judge.agent, path, "agent.")
    judge.name = judge.name or judge.agent.model or Path(judge.agent.local or "").name
    _need(path, judge.form in ("text", "json"), f"form: {judge.form!r} is unknown; choose text or json")
    _need(path, judge.orders >= 1, f"orders must be at least 1, not {judge.orders}")
    _need(path, judge.parse_attempts >= 1, f"parse_attempts must be at least 1, not {judge.parse_attempts}")
    return judge


def read_key(agent: Agent, name: str) -> str | None:
    """The agent's key from the environment.

    Raises:
        UserError: the variable is not set.
    """
    if agent.api_key_env is None:
        return None
    key = os.environ.get(agent.api_key_env, "").strip()
    if not key:
        raise UserError(f"{name}: the environment variable {agent.api_key_env} is not set: put the API key there")
    return key


# What may change between two commands of one run: it does not change what is asked.
_FREE = {
    *("base_url", "api_key_env", "requests_per_minute", "tokens_per_minute", "concurrency", "timeout", "attempts"),
    *("orders", "parse_attempts", "replace_failed", "batch", "batch_lines", "batch_bytes"),
    *("patience", "price", "image_tokens", "expected_tokens", "serves"),
}


def snapshot(config: Pool | Judge) -> dict[str, Any]:
    """The configuration as JSON, for the run's database. It holds names of environment variables, never keys."""
    return asdict(config)


def check_same(before: Any, now: dict[str, Any], what: str) -> None:
    """Refuses to continue a run under a configuration that asks something else.

    Raises:
        UserError: names what differs.
    """
    differing = [
        f"{'.'.join(key)} was {old!r} and is {new!r}"
        for key, old, new in _differences(before, now)
        if key[-1] not in _FREE
    ]
    if differing:
        raise UserError(f"this run was begun with another {what}: {', '.join(differing[:3])}; use the old or a new run")


def _differences(before: Any, now: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict) and path[-1:] != ("price",):
        return [
            difference
            for key in dict.fromkeys([*before, *now])
            for difference in _differences(before.get(key), now.get(key), (*path, key))
        ]
    return [(path, before, now)] if before != now else []


def _check_agent(agent: Agent, path: str | os.PathLike[str], key: str) -> None:
    def need(ok: bool, message: str) -> None:
        _need(path, ok, key + message)

    need(bool(agent.model) or agent.local is not None, "model must be set (or local, for a folder)")
    need(not set("@?#") & set(agent.base_url), "base_url must hold no key: name its variable in api_key_env")
    need(_is_url(agent.base_url), "base_url must be like https://host/v1")
    need(
        agent.api_key_env is None or bool(_ENVIRONMENT.fullmatch(agent.api_key_env)),
        "api_key_env must be the name of an environment variable, not the key itself",
    )
    need(agent.prompt.count("{prompt}") == 1, "prompt must hold {prompt} once")
    need(agent.image_detail in (None, "low", "high", "auto"), "image_detail must be low, high or auto")
    need(
        agent.max_tokens_field in ("max_tokens", "max_completion_tokens"),
        "max_tokens_field must be max_tokens or max_completion_tokens",
    )
    need(agent.dtype in ("bfloat16", "float32"), "dtype must be bfloat16 or float32")
    whole = ("max_tokens", "concurrency", "attempts", "batch_lines", "batch_bytes")
    for name in (*whole, "requests_per_minute", "tokens_per_minute"):
        value = getattr(agent, name)
        need(value is None or value >= 1, f"{name} must be at least 1, not {value}")
    for name in ("timeout", "patience", "weight"):
        need(getattr(agent, name) > 0, f"{name} must be positive, not {getattr(agent, name)}")
    need(agent.expected_tokens >= 0, "expected_tokens must not be negative")
    for name in agent.sampling:
        need(name not in _SET_ELSEWHERE, f"sampling.{name} is set by {_SET_ELSEWHERE.get(name)}")
    if agent.price is not None:
        amounts = (agent.price.input, agent.price.output, agent.price.batch)
        need(min(amounts) >= 0, "price must not be negative")


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def _need(path: str | os.PathLike[str], ok: bool, message: str) -> None:
    if not ok:
        raise UserError(f"{path}: {message}")
