"""A model behind the OpenAI chat API on this machine, for whatever speaks that API, such as `silkie corpus respond`.

    python -m silkie_jax.serving.serve MODEL [--adapter DIR] [--dtype bfloat16] [--port 8000]

It prints `serving at http://127.0.0.1:PORT/v1` once the model is loaded. Images come as data URLs and in no other way:
it opens no file and fetches nothing that a request names. Requests that arrive together are generated together.
"""

import argparse
import base64
import binascii
import json
import os
import queue
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from silkie_jax.errors import UserError
from silkie_jax.generation.generate import generate
from silkie_jax.loading import load
from silkie_jax.models.qwen_vl.chat import SYSTEM, Turn, chat_prompt, decode_reply
from silkie_jax.models.qwen_vl.image import read_image

_BUCKET = 64  # prompts are padded to multiples of it, so that few lengths are compiled
_MOST_AT_ONCE = 8
_MOST_BYTES = 64 * 2**20  # of a request
_DATA_URL = re.compile(r"data:image/[a-z+.-]+;base64,")


@dataclass(eq=False)
class Job:
    """One request on its way to the model.

    Attributes:
        tokens: of the prompt.
        images: uint8 [S, S, 3] each.
        max_tokens, temperature, top_p, seed: as in `generate`.
        reply: what it generated, or why not; set before `done`.
    """

    tokens: list[int]
    images: list[np.ndarray]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    reply: list[int] | Exception = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def group(self) -> tuple[Any, ...]:
        """Jobs of one group can be generated together."""
        bucket = -(-len(self.tokens) // _BUCKET)
        return bucket, len(self.images), self.max_tokens, self.temperature, self.top_p, self.seed


class Generator:
    """The model, and the queue before it. `work` is to run in one thread, forever."""

    def __init__(self, path: str, dtype: str, adapter: str | None):
        self.model, self.tokenizer = load(path, dtype=dtype, adapter=adapter)
        self.name = Path(path).resolve().name
        self._queue: queue.Queue[Job] = queue.Queue()

    def submit(self, job: Job) -> list[int]:
        """The ids that follow the prompt, up to and with the one that ended them."""
        self._queue.put(job)
        job.done.wait()
        if isinstance(job.reply, Exception):
            raise job.reply
        return job.reply

    def work(self) -> None:
        waiting: list[Job] = []
        while True:
            if not waiting:
                waiting.append(self._queue.get())
                time.sleep(0.01)  # others may come right behind
            while not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            group = waiting[0].group
            jobs = [job for job in waiting if job.group == group][:_MOST_AT_ONCE]
            waiting = [job for job in waiting if job not in jobs]
            try:
                for job, reply in zip(jobs, self._generate(jobs), strict=True):
                    job.reply = reply
            except Exception as error:
                for job in jobs:
                    job.reply = error
            for job in jobs:
                job.done.set()

    def _generate(self, jobs: list[Job]) -> list[list[int]]:
        size = 1 << (len(jobs) - 1).bit_length()  # few batch sizes are compiled; the last job fills the batch up
        rows = jobs + [jobs[-1]] * (size - len(jobs))
        width = jobs[0].group[0] * _BUCKET
        tokens = np.full((size, width), self.tokenizer.end_of_text)
        mask = np.zeros((size, width), bool)
        for row, job in enumerate(rows):
            tokens[row, width - len(job.tokens) :] = job.tokens
            mask[row, width - len(job.tokens) :] = True
        images = [image for job in rows for image in job.images]
        stop = (self.tokenizer.im_end, self.tokenizer.im_start)
        first = jobs[0]
        out = generate(
            self.model,
            tokens,
            np.stack(images) if images else None,
            first.max_tokens,
            mask=mask,
            temperature=first.temperature,
            top_p=first.top_p,
            stop=stop,
            seed=first.seed,
        )
        endings = (*stop, self.tokenizer.end_of_text)
        replies = []
        for ids in np.asarray(out)[: len(jobs)].tolist():
            length = next((n + 1 for n, token in enumerate(ids) if token in endings), len(ids))
            replies.append(ids[:length])
        return replies

    def job(self, body: dict[str, Any]) -> Job:
        """A chat request as a job.

        Raises:
            UserError: it asks for something that this server does not do.
        """
        if body.get("stream") or body.get("n", 1) != 1:
            raise UserError("stream and n are not supported")
        system = SYSTEM
        history: list[Turn] = []
        asked: tuple[str, int] | None = None  # the user's turn that has no reply yet, with its number of images
        images: list[np.ndarray] = []
        for message in body.get("messages") or []:
            text, found = self._content(message.get("content"))
            role = message.get("role")
            if role == "system":
                system = text
            elif role == "user" and asked is None:
                asked = text, len(found)
                images += found
            elif role == "assistant" and asked is not None:
                history.append(Turn(asked[0], text, asked[1]))
                asked = None
            else:
                raise UserError(f"a message of role {role!r} is out of place: user and assistant take turns")
        if asked is None:
            raise UserError("the last message must be the user's")
        prompt = chat_prompt(self.tokenizer, *asked, history, system)
        return Job(
            tokens=prompt.tokens,
            images=images[prompt.dropped_images :],
            max_tokens=_number(body, ("max_completion_tokens", "max_tokens"), 512, int),
            temperature=_number(body, ("temperature",), 1.0, float),
            top_p=_number(body, ("top_p",), 1.0, float),
            seed=_number(body, ("seed",), 0, int),
        )

    def _content(self, content: Any) -> tuple[str, list[np.ndarray]]:
        if isinstance(content, str):
            return content, []
        texts, images = [], []
        for part in content if isinstance(content, list) else []:
            if part.get("type") == "text":
                texts.append(part["text"])
                continue
            url = (part.get("image_url") or {}).get("url") or ""
            if not (begin := _DATA_URL.match(url)):
                raise UserError("images must be data URLs in base64")
            try:
                data = base64.b64decode(url[begin.end() :], validate=True)
            except binascii.Error as error:
                raise UserError(f"an image is not valid base64 ({error})") from None
            images.append(read_image(data, self.model.config.visual.image_size))
        return "\n".join(texts), images

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The chat completion for a request."""
        job = self.job(body)
        tokens = self.submit(job)
        endings = (self.tokenizer.im_end, self.tokenizer.im_start, self.tokenizer.end_of_text)
        finish = "stop" if tokens and tokens[-1] in endings else "length"
        message = {"role": "assistant", "content": decode_reply(self.tokenizer, tokens), "refusal": None}
        usage = {"prompt_tokens": len(job.tokens), "completion_tokens": len(tokens)}
        return {
            "id": f"chatcmpl-{time.time_ns()}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }


def _number(body: dict[str, Any], names: tuple[str, ...], default: Any, kind: type) -> Any:
    value = next((body[name] for name in names if body.get(name) is not None), default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or kind(value) != value:
        raise UserError(f"{names[0]}: {value!r} is not a number of the right kind")
    return kind(value)


def _handler(generator: Generator) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                self._answer(200, {"object": "list", "data": [{"id": generator.name, "object": "model"}]})
            else:
                self._error(404, f"there is no {self.path}")

        def do_POST(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            if size > _MOST_BYTES:
                self.close_connection = True
                self._error(413, f"a request may have {_MOST_BYTES} bytes")
                return
            data = self.rfile.read(size)
            if self.path != "/v1/chat/completions":
                self._error(404, f"there is no {self.path}")
                return
            try:
                self._answer(200, generator.complete(json.loads(data)))
            except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
                self._error(400, str(error) or type(error).__name__)
            except Exception as error:  # out of memory, for one: the request may be tried again
                self._error(500, f"{type(error).__name__}: {error}")

        def _error(self, status: int, message: str) -> None:
            kind = "invalid_request_error" if status < 500 else "server_error"
            self._answer(status, {"error": {"message": message, "type": kind, "code": None, "param": None}})

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> int:
    """Loads the model and serves until it is stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--end-with-stdin", action="store_true", help="stop when whoever started it is gone")
    args = parser.parse_args()
    if args.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        generator = Generator(args.model, args.dtype, args.adapter)
        with ThreadingHTTPServer(("127.0.0.1", args.port), _handler(generator)) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            print(f"serving at http://127.0.0.1:{server.server_port}/v1", flush=True)
            generator.work()
    except UserError as error:
        print(f"silkie: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
