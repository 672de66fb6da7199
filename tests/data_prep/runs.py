"""Small runs against the scripted server."""

import io
import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from data_prep.respond import respond
from data_prep.run import Instruction, Run
from silkie_jax.endpoints.stage import Options

QUIET = Options(progress=False)
MODELS = ("m0", "m1", "m2", "m3", "m4", "m5")


def picture(n: int) -> bytes:
    """A PNG of its own for every number."""
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (n % 256, n // 256, 99)).save(file, "PNG")
    return file.getvalue()


def make_run(folder: Path, count: int, words: str = "What is in picture {}?") -> Path:
    """A run with instructions, each with a picture of its own."""
    with Run.create(folder) as run, run.transaction():
        instructions = [Instruction(f"i{n}", words.format(n), (run.add_image(picture(n)),)) for n in range(count)]
    with Run.create(folder) as run:
        run.write_instructions(instructions, {"of": "a test"})
    return folder


def make_answered(folder: Path, count: int, url: str) -> Path:
    """A run whose instructions the models of the scripted server have answered."""
    respond(make_run(folder, count), write_pool(folder.with_suffix(".pool"), url), QUIET)
    return folder


def agent(url: str, model: str, **changes) -> dict:
    """An endpoint at the scripted server, whose tokens the estimate knows how to count.

    Its time-out is one that no busy machine passes: a reply given up may have been billed, and is asked for again.
    """
    price = {"input": 10.0, "output": 30.0}
    settings = {"model": model, "base_url": url, "price": price, "image_tokens": 85, "expected_tokens": 52}
    return {**settings, "max_tokens": 200, "timeout": 60.0, **changes}


def write_pool(path: Path, url: str, models=MODELS, pool: dict | None = None, **changes) -> Path:
    """A pool's YAML (JSON is YAML)."""
    path.write_text(json.dumps({"models": {name: agent(url, name, **changes) for name in models}, **(pool or {})}))
    return path


def write_judge(path: Path, url: str, judge: dict | None = None, **changes) -> Path:
    """A judge's YAML."""
    settings = agent(url, "judge", **{"max_tokens": 1000, "expected_tokens": 205, **changes})
    path.write_text(json.dumps({"name": "judge", "agent": settings, **(judge or {})}))
    return path


def start(verb: str, *arguments: object, **options) -> subprocess.Popen[str]:
    """`silkie corpus VERB ...` in a process of its own."""
    command = [sys.executable, "-m", "silkie_jax.cli", "corpus", verb, *map(str, arguments)]
    return subprocess.Popen(
        command, **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, **options}
    )


def everything(folder: Path) -> list:
    """All that a run yields, to compare two of them."""
    with Run.open(folder) as run:
        return list(run.gathered())


def cents(server, price=(10.0, 30.0)) -> float:
    """USD that the server billed."""
    tokens = server.tokens()
    return (tokens[0] * price[0] + tokens[1] * price[1]) / 1e6
