"""The ASGI application: routes, what they answer, and whom they let in."""

import asyncio
import hmac
import ipaddress
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from silkie_jax.errors import UserError
from silkie_jax.serving.chat_reply import Answer, chunks, completion
from silkie_jax.serving.chat_request import read_chat
from silkie_jax.serving.house import READY, House, Visit
from silkie_jax.serving.limits import Refused, as_refused
from silkie_jax.serving.logprobs_request import logprobs_reply, read_logprobs
from silkie_jax.serving.loop import Job
from silkie_jax.serving.model import ServedModel

T = TypeVar("T")


def make_app(house: House, hosts: Collection[str] = (), key: str | None = None) -> Starlette:
    """The application.

    Args:
      house: what it serves.
      hosts: names by which clients may call this machine, besides localhost and addresses.
      key: what clients must show; None: nothing.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        house.start()
        yield

    routes = [
        Route("/v1/chat/completions", partial(_chat, house), methods=["POST"]),
        Route("/v1/logprobs", partial(_logprobs, house), methods=["POST"]),
        Route("/v1/models", partial(_models, house)),
        Route("/v1/models/{name:path}", partial(_model, house)),
        Route("/health", partial(_health, house)),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Guard, hosts=hosts, key=key)],
        exception_handlers={
            UserError: _refused,
            HTTPException: _no_such_route,
            ClientDisconnect: _nobody_there,
            Exception: _refused,
        },
    )


# Routes


async def _chat(house: House, request: Request) -> Response:
    visit, model, body = await _enter(house, request)
    try:
        asked = await _read(read_chat, body, model, house)
        del body
        visit.take(asked.request.n)
        visit.begin(Job(asked))
        answer = Answer(asked, model, f"chatcmpl-{secrets.token_hex(12)}", int(time.time()))
        # The first news are waited for, so that what fails before them has its status.
        first = await _unless_gone(request, visit.news())
        if asked.stream:
            return _Stream(visit, chunks(answer, first, visit.news))
        reply = _json(await _unless_gone(request, completion(answer, first, visit.news)))
        visit.close(whole=True)
        return reply
    except BaseException:
        visit.close()
        raise


async def _logprobs(house: House, request: Request) -> Response:
    visit, model, body = await _enter(house, request)
    try:
        visit.begin(Job(await _read(read_logprobs, body, model, house)))
        reply = _json(logprobs_reply(model, await _unless_gone(request, visit.news())))
        visit.close(whole=True)
        return reply
    except BaseException:
        visit.close()
        raise


async def _models(house: House, _: Request) -> Response:
    return _json({"object": "list", "data": [_about(house)]})


async def _model(house: House, request: Request) -> Response:
    if (name := request.path_params["name"]) != house.name:
        raise Refused(f"there is no model {name!r} here, only {house.name!r}", 404, "model", "model_not_found")
    return _json(_about(house))


async def _health(house: House, _: Request) -> Response:
    return _json(house.health(), 200 if house.state == READY else 503)


def _about(house: House) -> dict[str, object]:
    return {"id": house.name, "object": "model", "created": house.created, "owned_by": "silkie_jax"}


# What they share


async def _enter(house: House, request: Request) -> tuple[Visit, ServedModel, bytes]:
    """A seat, the model, and the request's body.

    Raises:
      Refused: the server is full, or the body is too large, too slow or not JSON.
    """
    visit, model = house.enter()
    try:
        # A page in a browser may send other types anywhere without asking; JSON it may not.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused("the content type must be application/json", 415)
        async with asyncio.timeout_at(visit.deadline):
            return visit, model, await _body(request, house.limits.body)
    except TimeoutError:
        visit.close()
        raise visit.too_late() from None
    except BaseException:
        visit.close()
        raise


async def _body(request: Request, most: int) -> bytes:
    too_large = Refused(f"a request may have {most:,} bytes", 413, code="request_too_large")
    if request.headers.get("content-length", "0").isdecimal() and int(request.headers.get("content-length", 0)) > most:
        raise too_large
    found = bytearray()
    async for chunk in request.stream():
        found += chunk
        if len(found) > most:
            raise too_large
    return bytes(found)


async def _read(read: Callable[..., T], body: bytes, model: ServedModel, house: House) -> T:
    """Parses a body in another thread: images take time. Few at once: they take memory, too."""
    async with house.readers:
        return await run_in_threadpool(read, body, model, house.limits)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What comes of some work, which ends if the client goes away first.

    Raises:
      ClientDisconnect: it did.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch, task = asyncio.ensure_future(gone()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({watch, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        task.cancel()


class _Stream(StreamingResponse):
    """Server-sent events; however they end, the visit is over."""

    def __init__(self, visit: Visit, events: AsyncIterator[bytes]):
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._visit = visit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._visit.close(whole=True)


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    data = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return Response(data, status, headers, "application/json")


async def _refused(_: Request, error: Exception) -> Response:
    refused = as_refused(error)
    return _json(refused.body(), refused.status, dict(refused.headers))


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is no", 405: f"{request.method} is not for"}.get(error.status_code, error.detail)
    return await _refused(
        request, Refused(f"{what} {request.url.path}", error.status_code, headers=error.headers or {})
    )


async def _nobody_there(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


# Who may come in


class Guard:
    """Middleware: lets in who calls this machine by a name that it has, with the key where one is asked for.

    The Host check keeps web pages out: one whose own name leads to 127.0.0.1 (DNS rebinding) still uses that name.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], key: str | None):
        self.app, self.key = app, key
        self.hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        problem = self._problem(scope["path"], headers.get(b"host", ""), headers.get(b"authorization", ""))
        if problem is None:
            await self.app(scope, receive, send)
        else:
            await (await _refused(Request(scope), problem))(scope, receive, send)

    def _problem(self, path: str, host: str, authorization: str) -> Refused | None:
        if not self._is_ours(host):
            return Refused(f"this server is not called {host[:100]!r}; --allow-host lets it be", 421, code="wrong_host")
        if self.key is not None and path != "/health":
            scheme, _, given = authorization.partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
                return Refused(
                    "the API key is missing or wrong (Authorization: Bearer KEY)", 401, code="invalid_api_key"
                )
        return None

    def _is_ours(self, host: str) -> bool:
        name = host.lower().strip()
        name = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # addresses need no name, and no name leads to them
