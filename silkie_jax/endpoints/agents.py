"""Who is asked: a model behind an endpoint, with its own form of request, price and limits."""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from silkie_jax.errors import UserError

_ENVIRONMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SET_ELSEWHERE = {
    "model": "model",
    "messages": "prompt, system and the instructions",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens with max_tokens_field",
    "response_format": "form: json of a judge",
    "n": "models_per_instruction of a pool",
    "stream": "nothing: replies are read whole",
}


@dataclass
class Price:
    """USD for a million tokens; `batch` is what the Batch API charges of it."""

    input: float
    output: float
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
    *("batch", "batch_lines", "batch_bytes", "patience", "price", "image_tokens", "expected_tokens", "serves"),
}


def check_same(before: Any, now: dict[str, Any], what: str, free: Collection[str] = ()) -> None:
    """Refuses to continue a run under a configuration that asks something else.

    Args:
        before, now: mappings with agents in them, as JSON holds them.
        what: the configuration is of, for the error.
        free: further keys that may change.

    Raises:
        UserError: names what differs.
    """
    differing = [
        f"{'.'.join(key)} was {old!r} and is {new!r}"
        for key, old, new in _differences(before, now)
        if key[-1] not in _FREE and key[-1] not in free
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


def check_agent(agent: Agent, path: str | os.PathLike[str], key: str) -> None:
    """Refuses what no endpoint can be asked with; `path` and `key` say where it stands.

    Raises:
        UserError: one line that names the file, the key and the mend.
    """

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(f"{path}: {key}{message}")

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
