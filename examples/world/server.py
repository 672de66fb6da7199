"""A real HTTP server on 127.0.0.1 that speaks OpenAI's API (chat, files, batches), and `/v1/similarity` as a server of
CLIP does (data_prep/clip_server.py); functions say what models reply.

The pool of the small world (pool.py) and the tests of clients stand on it. What is replied depends on the request
alone, so that runs can be compared byte by byte. Faults meet a share of the requests, chosen by a hash of the request,
on its first attempts only, unless `always` says otherwise.
"""

import asyncio
import base64
import email.parser
import email.policy
import hashlib
import json
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FAULTS = (
    "429", "429-retry-after", "500", "503", "timeout", "reset", "malformed", "not-a-completion", "empty",
    "refusal", "truncated", "content_filter", "400", "403", "quota", "unparsable",
)  # fmt: skip
BATCH_FAULTS = ("error-line", "no-line", "expired", "failed")


@dataclass
class Script:
    """How the server behaves.

    Attributes:
        faults: kind -> share of the requests that meet it first.
        times: attempts of a request that meet its fault.
        always: kinds that every attempt meets.
        batch_faults: the same, for lines of batches; "expired" and "failed" meet whole batches, by number.
        delay: seconds before a reply.
        requests, tokens, window: a limit in any `window` seconds, refused with 429 and told in headers.
        credit: replies before `insufficient_quota`.
        key: the only one that is accepted.
        polls: looks at a batch before it is completed.
        most_lines: of a batch file.
        reply: request -> what the model says.
        similarity: request -> 100 times the cosine of its picture and each of its texts; None: there is no such path.
    """

    faults: dict[str, float] = field(default_factory=dict)
    times: int = 1
    always: tuple[str, ...] = ("refusal", "truncated", "content_filter", "400", "403", "unparsable")
    batch_faults: dict[str, Any] = field(default_factory=dict)
    delay: float = 0.0
    requests: int | None = None
    window: float = 1.0
    headers: bool = True
    credit: int | None = None
    key: str | None = None
    polls: int = 1
    most_lines: int = 50_000
    reply: Callable[[dict[str, Any]], str] = lambda request: "I have nothing to say."
    similarity: Callable[[dict[str, Any]], list[float]] | None = None


@dataclass
class Declined(Exception):
    """What a reply function raises where the server is to answer with an error: a status of HTTP and its words."""

    status: int
    message: str
    code: str


@dataclass
class Seen:
    """One chat request or line of a batch, as the server lived through it."""

    key: str  # hash of the request
    model: str
    began: float
    ended: float | None = None
    status: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    batch: str | None = None
    paid: bool = False


class Server:
    """A context manager that serves in a thread of its own.

    Attributes:
        url: base URL for a client.
        log: everything seen, in order.
        hits: HTTP requests so far.
    """

    def __init__(self, script: Script | None = None, port: int = 0):
        self.script = script or Script()
        self.log: list[Seen] = []
        self.hits = 0
        self.headers: list[dict[str, str]] = []
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict] = {}
        self._port = port
        self._attempts: Counter[str] = Counter()
        self._recent: list[float] = []
        self._connections: set[asyncio.StreamWriter] = set()

    def __enter__(self):
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def paid(self) -> Counter[str]:
        """Request -> how often it was answered and billed."""
        return Counter(seen.key for seen in self.log if seen.paid)

    def forget(self) -> None:
        """Every request is again the first of its kind."""
        self.log.clear()
        self.batches.clear()
        self._attempts.clear()

    def tokens(self) -> tuple[int, int]:
        """Input and output tokens billed."""
        paid = [seen for seen in self.log if seen.paid]
        return sum(s.input_tokens for s in paid), sum(s.output_tokens for s in paid)

    async def _serve(self, ready):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self._port, limit=2**26, backlog=512)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        ready.set()
        await self._stop.wait()
        server.close()
        for writer in list(self._connections):
            writer.transport.abort()

    async def _connection(self, reader, writer):
        self._connections.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                request, *lines = head.split("\r\n")
                headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines) if k}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = request.split(" ")
                self.hits += 1
                self.headers.append(headers) if len(self.headers) < 10 else None
                answer = await self._route(method, path.partition("?")[0].removeprefix("/v1"), headers, body)
                if answer is None:  # a connection reset
                    writer.transport.abort()
                    return
                status, content, extra = answer
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                fields = {"content-type": "application/json", "content-length": len(data), **extra}
                head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{k}: {v}\r\n" for k, v in fields.items()) + "\r\n"
                writer.write(head.encode() + data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _route(self, method, path, headers, body):
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if self.script.key is not None and key != self.script.key:
            return error(401, f"Incorrect API key provided: {key}.", "invalid_api_key")
        match method, path.strip("/").split("/"):
            case "POST", ["chat", "completions"]:
                return await self._chat(body)
            case "POST", ["similarity"] if self.script.similarity is not None:
                return self._compare(json.loads(body), self.script.similarity)
            case "POST", ["files"]:
                return self._upload(headers, body)
            case "GET", ["files", id, "content"] if id in self.files:
                return 200, self.files[id], {}
            case "DELETE", ["files", id] if id in self.files:
                return 200, {"id": id, "object": "file", "deleted": True}, {}
            case "POST", ["batches"]:
                return self._create_batch(json.loads(body))
            case "GET", ["batches"]:
                return 200, {"object": "list", "data": list(self.batches.values())[::-1], "has_more": False}, {}
            case "GET", ["batches", id] if id in self.batches:
                return 200, self._look_at(id), {}
        return error(404, f"there is no {method} {path}", "not_found")

    # Chat

    async def _chat(self, body):
        script = self.script
        request = json.loads(body)
        seen = Seen(digest(body), request["model"], time.time())
        self.log.append(seen)
        extra = self._limit_headers()
        self._attempts[seen.key] += 1
        fault = self._fault(seen.key, script.faults, self._attempts[seen.key])
        try:
            if extra.get("x-ratelimit-remaining-requests") == "-1":
                extra["x-ratelimit-remaining-requests"] = "0"
                return self._end(seen, error(429, "too fast", "rate_limit_exceeded", **extra))
            if script.delay:
                await asyncio.sleep(script.delay)
            if script.credit is not None and sum(s.paid for s in self.log) >= script.credit:
                return self._end(seen, error(429, "You exceeded your current quota", "insufficient_quota"))
            match fault:
                case "429":
                    return self._end(seen, error(429, "slow down", "rate_limit_exceeded"))
                case "429-retry-after":
                    headers = {"retry-after": "1"} if int(seen.key[0], 16) % 2 else {"retry-after-ms": "200"}
                    return self._end(seen, error(429, "slow down", "rate_limit_exceeded", **headers))
                case "quota":
                    return self._end(seen, error(429, "You exceeded your current quota", "insufficient_quota"))
                case "500" | "503":
                    return self._end(seen, error(int(fault), "the server had an error", "server_error"))
                case "400":
                    return self._end(seen, error(400, "this image is not supported", "invalid_image"))
                case "403":
                    return self._end(seen, error(403, "the image was flagged", "content_policy_violation"))
                case "timeout":
                    await asyncio.sleep(60)
                case "reset":
                    return None
                case "malformed":
                    return self._end(seen, (200, b'{"choices": [{"mess', {}))
                case "not-a-completion":
                    return self._end(seen, (200, b'["surprise"]', {}))
            try:
                reply = complete(request, script, fault)
            except Declined as why:
                return self._end(seen, error(why.status, why.message, why.code))
            usage = reply["usage"]
            seen.input_tokens, seen.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            seen.paid = True
            return self._end(seen, (200, reply, extra))
        finally:
            seen.ended = time.time()

    def _end(self, seen, answer):
        seen.status = answer[0]
        return answer

    def _fault(self, key, shares, attempt):
        place, top = int(key[:8], 16) / 2**32, 0.0
        for kind, share in shares.items():
            top += share
            if place < top:
                return kind if kind in self.script.always or attempt <= self.script.times else None
        return None

    def _limit_headers(self):
        """Counts the request against the limit; remaining -1 when it is one too many."""
        script, now = self.script, time.monotonic()
        if script.requests is None:
            return {}
        self._recent = [when for when in self._recent if now - when < script.window]
        remaining = script.requests - len(self._recent) - 1
        if remaining >= 0:
            self._recent.append(now)
        if not script.headers:
            return {} if remaining >= 0 else {"x-ratelimit-remaining-requests": "-1"}
        reset = self._recent[0] + script.window - now if self._recent else 0.0
        return {
            "x-ratelimit-remaining-requests": str(max(remaining, -1)),
            "x-ratelimit-reset-requests": f"{math.ceil(reset * 1000)}ms",
        }

    # Likeness

    def _compare(self, request, similarity):
        try:
            values = similarity(request)
        except Declined as why:
            return error(why.status, why.message, why.code)
        data = [{"index": index, "similarity": value} for index, value in enumerate(values)]
        return 200, {"object": "list", "data": data, "model": request["model"], "usage": {"total_tokens": 0}}, {}

    # Files and batches

    def _upload(self, headers, body):
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(
            b"content-type: " + headers["content-type"].encode() + b"\r\n\r\n" + body
        )
        parts = {part.get_param("name", header="content-disposition"): part for part in message.iter_parts()}
        assert parts["purpose"].get_content().strip() == "batch"
        data: Any = parts["file"].get_payload(decode=True)
        id = f"file-{len(self.files)}"
        self.files[id] = data
        return 200, {"id": id, "object": "file", "bytes": len(data), "created_at": 0, "filename": "x.jsonl",
                     "purpose": "batch", "status": "processed"}, {}  # fmt: skip

    def _create_batch(self, request):
        assert request["endpoint"] == "/v1/chat/completions"
        id = f"batch_{len(self.batches)}"
        self.batches[id] = {
            "id": id, "object": "batch", "endpoint": request["endpoint"], "input_file_id": request["input_file_id"],
            "completion_window": request["completion_window"], "status": "validating", "created_at": int(time.time()),
            "metadata": request.get("metadata"), "output_file_id": None, "error_file_id": None, "errors": None,
            "looks": 0, "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }  # fmt: skip
        return 200, self.batches[id], {}

    def _look_at(self, id):
        """A batch moves on each time somebody looks; at the end its lines are answered in an order of their own."""
        batch = self.batches[id]
        batch["looks"] += 1
        if batch["status"] in ("validating", "in_progress"):
            batch["status"] = "in_progress"
            if batch["looks"] > self.script.polls:
                self._finish(batch)
        return batch

    def _finish(self, batch):
        faults = self.script.batch_faults
        number = int(batch["id"].removeprefix("batch_"))
        lines = self.files[batch["input_file_id"]].splitlines()
        if len(lines) > self.script.most_lines or number in faults.get("failed", ()):
            batch["status"] = "failed"
            batch["errors"] = {"object": "list", "data": [{"code": "too_many", "message": "the file has an error"}]}
            return
        cut = len(lines) // 2 if number in faults.get("expired", ()) else len(lines)
        done, errors = [], []
        for n, line in enumerate(lines):
            line = json.loads(line)
            assert line["method"] == "POST"
            assert line["url"] == "/v1/chat/completions"
            body = line["body"]
            key = digest(json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode())
            self._attempts[key] += 1
            share = {kind: share for kind, share in faults.items() if isinstance(share, float)}
            fault = self._fault(key, share, self._attempts[key])
            entry = {"id": f"line-{n}", "custom_id": line["custom_id"], "response": None, "error": None}
            if n >= cut:
                entry["error"] = {"code": "batch_expired", "message": "not executed in time"}
                errors.append(entry)
            elif fault == "no-line":
                continue
            elif fault == "error-line":
                entry["response"] = {"status_code": 500, "request_id": "r", "body": {"error": {"message": "oops"}}}
                errors.append(entry)
            else:
                chat_fault = self._fault(key, self.script.faults, self._attempts[key])
                try:
                    reply = complete(body, self.script, chat_fault)
                except Declined as why:
                    status, content, _ = error(why.status, why.message, why.code)
                    entry["response"] = {"status_code": status, "request_id": "r", "body": content}
                    errors.append(entry)
                    continue
                usage = reply["usage"]
                now = time.time()
                self.log.append(
                    Seen(key, body["model"], now, now, 200, usage["prompt_tokens"], usage["completion_tokens"],
                         batch["id"], True)
                )  # fmt: skip
                entry["response"] = {"status_code": 200, "request_id": "r", "body": reply}
                done.append(entry)
        done.sort(key=lambda entry: digest(entry["custom_id"].encode()))
        for name, entries in (("output_file_id", done), ("error_file_id", errors)):
            if entries:
                batch[name] = f"file-{len(self.files)}"
                self.files[batch[name]] = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        batch["status"] = "expired" if cut < len(lines) else "completed"
        batch["request_counts"] = {"total": len(lines), "completed": len(done), "failed": len(errors)}


def complete(request: dict, script: Script, fault: str | None = None) -> dict:
    """The completion that a model of the script gives, or what a fault makes of it."""
    words, images = read(request)
    message: dict = {"role": "assistant", "content": None, "refusal": None}
    finish = "stop"
    if fault == "refusal":
        message["refusal"] = "I cannot help with that."
    elif fault == "content_filter":
        message["content"], finish = "", "content_filter"
    elif fault == "empty":
        message["content"] = ""
    elif fault == "unparsable":
        message["content"] = "All of them are fine."
    else:
        message["content"] = script.reply(request)
    if fault == "truncated":
        message["content"], finish = (message["content"] or "")[:40], "length"
    tokens = math.ceil(len(words.encode()) / 4) + 8 + 85 * len(images)
    answer = message["content"] or message["refusal"] or ""
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": f"{request['model']}-2026-01-01",
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        "usage": {"prompt_tokens": tokens, "completion_tokens": math.ceil(len(answer) / 4),
                  "total_tokens": tokens + math.ceil(len(answer) / 4)},
    }  # fmt: skip


def read(request: dict) -> tuple[str, list[str]]:
    """All text of a request, and the SHA-256 of each of its images' files."""
    texts, images = [], []
    for message in request["messages"]:
        content = message["content"]
        parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "text":
                texts.append(part["text"])
            else:
                images.append(picture(part["image_url"]["url"]))
    return "\n".join(texts), images


def picture(url: str) -> str:
    """The SHA-256 of an image's file, from its data URL."""
    kind, _, data = url.partition(",")
    assert kind.startswith("data:image/"), kind
    return digest(base64.b64decode(data))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def error(status: int, message: str, code: str, **headers: str):
    """An error as OpenAI words it."""
    kind = "insufficient_quota" if code == "insufficient_quota" else "error"
    return status, {"error": {"message": message, "type": kind, "code": code, "param": None}}, headers


def serve_until_input_ends(script: Script, port: int = 0) -> None:
    """Serve, print the base URL for clients, and end when standard input does."""
    with Server(script, port) as server:
        print(server.url, flush=True)
        while sys.stdin.readline():
            pass
