"""The pool and the judges of the small world behind OpenAI's protocol: one server that plays all models.

    python -m examples.world.make world --scenes 400 --seed 0
    python -m examples.world.pool world

serves what `pool.yaml` and `judge.yaml` beside this file name, at 127.0.0.1 and the port that they name, until its
standard input ends. A picture is known by its contents, so that whoever has seen the truth need not be told which scene
is meant. What a model replies depends on the seed and the request alone. The same server says how much texts look like
a picture (`/v1/similarity`), as a server of CLIP does.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.world import judge, questions, server
from examples.world.habits import HABITS
from examples.world.judge import Temper
from examples.world.likeness import likeness
from examples.world.scenes import Scene

PORT = 8471
URL = f"http://127.0.0.1:{PORT}/v1"
JUDGE = "judge"
"""Its name among the models."""
FOLDER = Path(__file__).parent
POOL_FILE, JUDGE_FILE = FOLDER / "pool.yaml", FOLDER / "judge.yaml"


@dataclass(frozen=True)
class Pool:
    """All models at once: call it with the body of a chat request.

    Attributes:
        truth: SHA-256 of a picture's file -> what it shows.
        seed: of every model's whims and the judge's noise.
        temper: the judge's.
    """

    truth: dict[str, Scene]
    seed: int = 0
    temper: Temper = field(default_factory=Temper)

    def __call__(self, request: dict[str, Any]) -> str:
        """What the model that the request names replies.

        Raises:
            server.Declined: there is no such model, or the picture is none of this world.
        """
        model = request["model"]
        words, images = server.read(request)
        if model != JUDGE and model not in HABITS:
            raise server.Declined(
                404, f"no model {model!r}; there are {', '.join([*HABITS, JUDGE])}", "model_not_found"
            )
        if len(images) != 1 or images[0] not in self.truth:
            raise server.Declined(400, "one picture of this world is expected", "invalid_image")
        scene = self.truth[images[0]]
        # Two requests that differ in anything that is sampled by (a seed, a temperature) draw other lots.
        sampled = {key: value for key, value in request.items() if key not in ("messages", "model")}
        lots = random.Random(f"{self.seed} {model} {images[0]} {words} {json.dumps(sampled, sort_keys=True)}")
        if model == JUDGE:
            return judge.reply(scene, request, words, lots, self.temper)
        return HABITS[model](scene, questions.read(scene, _asked(request)), lots)


@dataclass(frozen=True)
class Likeness:
    """In CLIP's place: call it with the body of a request to `/v1/similarity`.

    Attributes:
        truth: as of `Pool`.
        seed: of the noise.
    """

    truth: dict[str, Scene]
    seed: int = 0

    def __call__(self, request: dict[str, Any]) -> list[float]:
        """100 times the cosine of the picture and each text.

        Raises:
            server.Declined: the picture is none of this world.
        """
        images = [server.picture(one["url"]) for one in request["images"]]
        if len(images) != 1 or images[0] not in self.truth:
            raise server.Declined(400, "one picture of this world is expected", "invalid_image")
        lots = [random.Random(f"{self.seed} {images[0]} {text}") for text in request["texts"]]
        return [likeness(self.truth[images[0]], text, lot) for text, lot in zip(request["texts"], lots, strict=True)]


def _asked(request: dict[str, Any]) -> str:
    """The text of the last turn of the user."""
    content = [message for message in request["messages"] if message["role"] == "user"][-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


def write_configs(folder: Path, url: str, files: Sequence[Path] = (POOL_FILE, JUDGE_FILE)) -> list[Path]:
    """Copies of files of pools and judges that name another base URL; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file in files:
        written.append(folder / file.name)
        written[-1].write_text(file.read_text(encoding="utf-8").replace(URL, url), encoding="utf-8")
    return written


def read_truth(*folders: Path) -> dict[str, Scene]:
    """The scenes that `examples.world.make` wrote to folders, by the SHA-256 of their pictures."""
    truth = {}
    for folder in folders:
        for file in sorted(folder.rglob("scenes.jsonl")):
            with file.open(encoding="utf-8") as lines:
                for record in map(json.loads, lines):
                    truth[record["sha256"]] = Scene.from_json(record)
    return truth


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="made by examples.world.make")
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    truth = read_truth(*args.folders)
    if not truth:
        parser.error(f"{args.folders[0]}: no scenes.jsonl; make the folder with `python -m examples.world.make`")
    script = server.Script(reply=Pool(truth, args.seed), similarity=Likeness(truth, args.seed))
    server.serve_until_input_ends(script, args.port)


if __name__ == "__main__":
    main()
