"""One agent's endpoint by the `openai` client: bytes out, a typed reply back. One call is one attempt."""

import asyncio
import ipaddress
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2
import openai

from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.agents import Agent
from silkie_jax.endpoints.outcomes import EndpointReply, Scrubber

_LOCAL_SECONDS = 3600.0  # a model of one's own compiles first, and has one queue for all
_NO_KEY = "none"  # the client wants one even for endpoints that ask for none

# At DEBUG it writes the headers of replies as they come, and a server may repeat a key in them.
logging.getLogger("httpcore2").setLevel(logging.INFO)


class Answer(NamedTuple):
    """A reply and the headers that came with it."""

    reply: EndpointReply
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Route:
    """What is asked of an endpoint: a path below its base URL, and how status and body of a reply are read."""

    path: str
    read: Callable[[int, str], EndpointReply]


CHAT = Route("/chat/completions", outcomes.read)
LOGPROBS = Route("/logprobs", outcomes.read_data)
"""Of `silkie serve`: the log-probability of texts (silkie_jax/serving/logprobs_request.py)."""


CANDIDATES = Route("/chat/completions", outcomes.read_candidates)
"""Several continuations of one text, with their log-probabilities."""
SIMILARITY = Route("/similarity", outcomes.read_data)
"""Of a CLIP server (data_prep/clip_server.py): the likeness of an image and texts."""


class Client:
    """An async context manager.

    Args:
        agent: whose endpoint.
        key: of its API, or None.
        base_url: of a local agent's server, in place of the agent's.
        route: what is asked there.
    """

    def __init__(self, agent: Agent, key: str | None, base_url: str | None = None, route: Route = CHAT):
        self.agent = agent
        self.route = route
        self.timeout = agent.timeout if base_url is None else _LOCAL_SECONDS
        self.scrub = Scrubber([key])
        base_url = base_url or agent.base_url
        host = urlsplit(base_url).hostname or ""
        self.api = openai.AsyncOpenAI(
            api_key=key or _NO_KEY,
            base_url=base_url,
            timeout=self.timeout,
            max_retries=0,
            default_headers=None if _is_openai(host) else dict.fromkeys(_headers_for_openai(), openai.Omit()),  # type: ignore[arg-type]
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if _is_this_machine(host) else None,
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.api.close()

    async def ask(self, body: bytes) -> Answer:
        """Sends one request of JSON bytes. Never raises for what a server or a network can do."""
        try:
            # The raw response: what is stored is what was received, whatever shape it has.
            options: Any = {"headers": {"Content-Type": "application/json"}}
            async with asyncio.timeout(self.timeout):
                response = await self.api.post(self.route.path, cast_to=httpx2.Response, content=body, options=options)
        except openai.APIStatusError as error:
            reply = self.route.read(error.status_code, self.scrub.error(error.response.text))
            return Answer(reply, error.response.headers)
        except (openai.APITimeoutError, TimeoutError):
            words = f"no reply within {self.timeout:g} s"
            return Answer(EndpointReply(outcomes.TIMEOUT, error=words, may_be_billed=True), {})
        except (openai.OpenAIError, httpx2.HTTPError, OSError, ValueError) as error:
            cause = error.__cause__ or error
            words = outcomes.one_line(self.scrub.error(f"{type(cause).__name__}: {cause}"))
            sent = not isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout)
            return Answer(EndpointReply(outcomes.CONNECTION, error=words, may_be_billed=sent), {})
        return Answer(self.route.read(response.status_code, self.scrub(response.text)), response.headers)


def _is_this_machine(host: str) -> bool:
    """Whether a host needs no proxy, whatever the environment names: no proxy could reach it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _is_openai(host: str) -> bool:
    return host == "openai.com" or host.endswith(".openai.com")


def _headers_for_openai() -> list[str]:
    """Headers that the `openai` client adds from the environment: they identify the user, to OpenAI and nobody else."""
    lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").splitlines()
    return ["OpenAI-Organization", "OpenAI-Project", *(line.partition(":")[0].strip() for line in lines if ":" in line)]
