"""What the tests of judged benchmarks share: reading, judging and scoring as the command does it."""

import json
from pathlib import Path

from silkie_jax.evaluation.benchmark import Score
from silkie_jax.evaluation.running.replies import read_replies
from silkie_jax.evaluation.table import find_benchmark


def score(name, data, answers, replies=None, parser="official", **settings) -> Score:
    """From files to a score; `data` and `replies` may be None."""
    benchmark = find_benchmark(name)
    items = benchmark.items(Path(data), settings) if data else None
    items, given = benchmark.read_answers(Path(answers), items, settings)
    found = read_replies(Path(replies), benchmark, items, given, settings) if replies else None
    return benchmark.score(items, given, found, parser, settings)


def write(path: Path, value) -> Path:
    """JSON, or JSON lines of a list where the file is named so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl" and isinstance(value, list)
    path.write_text("".join(json.dumps(r) + "\n" for r in value) if lines else json.dumps(value), encoding="utf-8")
    return path


def load(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def figures(found: Score) -> dict[str, float]:
    return {name: float(value) for name, value in found.sums.figures().items()}
