"""The server of the small world with a pool whose texts state their quality and a judge that reads it.

Run `python -m tests.endpoints.server` for one in a process of its own.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from examples.world import server
from examples.world.server import complete, digest, read, serve_until_input_ends

__all__ = ["Script", "Server", "complete", "digest"]


@dataclass
class Script(server.Script):
    """With a pool and a judge unless `reply` says otherwise; `bias` is what the judge adds to the rating of Text 1."""

    reply: Callable[[dict[str, Any]], str] | None = None  # type: ignore[assignment]
    bias: float = 0.0

    def __post_init__(self):
        self.reply = self.reply or partial(reply, bias=self.bias)


class Server(server.Server):
    """Served with that pool and judge where no script is given."""

    def __init__(self, script: server.Script | None = None, port: int = 0):
        super().__init__(script or Script(), port)


def reply(request: dict, bias: float = 0.0) -> str:
    """A judge's ratings where there are texts to rate, else a response whose text states its quality."""
    words, images = read(request)
    if "<text 1>" in words:
        return judge(request, words, bias)
    name = digest((request["model"] + words + "".join(images)).encode())
    told = "and so on " * (int(name[2:4], 16) % 40)
    return f"{request['model']} sees {name[:12]} {told}quality {quality(request['model'], name)}"


def judge(request: dict, words: str, bias: float) -> str:
    """Rates each text by the quality that it states, in whichever form was asked for."""
    texts = re.findall(r"<text \d+>\n(.*?)\n</text \d+>", words, re.DOTALL)
    aspects = re.findall(r"^#### (.+) Assessment$", words, re.MULTILINE)
    schema = request.get("response_format", {}).get("json_schema", {}).get("schema")
    if schema:
        aspects = list(schema["properties"])

    def rating(aspect: str, n: int, text: str) -> int:
        stated = re.search(r"quality (\d)", text)
        value = (int(stated[1]) if stated else 2) + (bias if n == 0 else 0)
        value -= digest((aspect + text).encode())[0] in "0123"  # aspects differ for some texts
        return int(min(5, max(1, value)))

    if schema:
        return json.dumps(
            {
                aspect: {f"Text {n + 1}": {"Rationale": f"says {n}", "Rating": rating(aspect, n, text)}
                         for n, text in enumerate(texts)}
                for aspect in aspects
            }
        )  # fmt: skip
    lines = []
    for aspect in aspects:
        lines.append(f"#### {aspect} Assessment")
        for n, text in enumerate(texts):
            lines += [f"##### Output for Text {n + 1}", f"Rating: {rating(aspect, n, text)}", f"Rationale: {aspect}."]
    return "\n".join(lines)


def quality(model: str, name: str) -> int:
    """Some models are better than others, and none always."""
    return min(5, max(1, 1 + int(digest(model.encode())[0], 16) % 4 + int(name[0], 16) % 3 - 1))


def main() -> None:
    """Serves until its input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--bias", type=float, default=0.0)
    args = parser.parse_args()
    serve_until_input_ends(Script(delay=args.delay, bias=args.bias), args.port)


if __name__ == "__main__":
    main()
