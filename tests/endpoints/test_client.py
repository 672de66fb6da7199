"""Where requests go, and what goes with them: the environment's proxy and headers are not for everybody."""

import asyncio

import openai
import pytest

from silkie_jax.endpoints.agents import Agent
from silkie_jax.endpoints.client import Client
from tests.endpoints.server import Server

BODY = b'{"model": "m", "messages": [{"role": "user", "content": "?"}]}'


def ask(agent: Agent, base_url: str | None = None):
    async def work():
        async with Client(agent, None, base_url) as client:
            return (await client.ask(BODY)).reply

    return asyncio.run(work())


@pytest.fixture
def proxy(monkeypatch):
    """A server that the environment names as the proxy for everything."""
    with Server() as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, server.url.removesuffix("/v1"))
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.mark.parametrize("local", [False, True], ids=["an endpoint on this machine", "a model of one's own"])
def test_this_machine_is_asked_without_a_proxy(proxy, local):
    with Server() as server:
        agent = Agent(local="folder") if local else Agent(model="m", base_url=server.url)
        assert ask(agent, server.url if local else None).outcome == "ok"
        assert server.hits == 1
    assert proxy.hits == 0


def test_other_machines_are_asked_through_the_proxy(proxy):
    ask(Agent(model="m", base_url="http://models.example/v1"))
    assert proxy.hits == 1


def sent_headers(monkeypatch, base_url: str) -> set[str]:
    """Names of the headers that a request to `base_url` would have."""
    seen: list = []

    async def send(self, request, **options):
        seen.append(request)
        raise openai.APIConnectionError(request=request)

    monkeypatch.setattr(openai.DefaultAsyncHttpxClient, "send", send)
    ask(Agent(model="m", base_url=base_url))
    (request,) = seen
    return set(request.headers)


AMBIENT = {"openai-organization", "openai-project", "x-of-mine"}


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("https://api.openai.com/v1", AMBIENT),
        ("https://eu.api.openai.com/v1", AMBIENT),
        ("https://api.example.com/v1", set()),
        ("https://notopenai.com/v1", set()),
        ("https://api.openai.com.example.com/v1", set()),
        ("http://127.0.0.1:9/v1", set()),
    ],
)
def test_headers_that_identify_the_user_go_to_openai_alone(monkeypatch, base_url, expected):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-mine")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Of-Mine: secret")
    assert sent_headers(monkeypatch, base_url) & AMBIENT == expected
