"""ALLaVA (arXiv 2402.11684): what a teacher's reply comes to."""

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.synthesize import parse
from tests.related.differences import same

FORMS = {"laion": "image", "vflan": "question"}


def replies(folder: Path) -> Iterator[str]:
    """Every case of `allava_replies.json`."""
    for case in json.loads((folder / "allava_replies.json").read_text())["cases"]:
        found = parse(case["reply"], FORMS[case["form"]], finish_reason=case["finish_reason"])
        for key, expected in case["expected"].items():
            ours = getattr(found, key)
            yield from same(f"{case['name']}: {key}", list(ours) if key == "candidates" else ours, expected)
