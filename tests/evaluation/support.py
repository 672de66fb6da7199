"""A small benchmark of yes/no questions about small pictures, for tests that answer one."""

import json
from pathlib import Path

from silkie_jax.evaluation.mme import TASKS
from tests.training.support import image_bytes

WORDS = ("cat", "dog", "bus", "red ball", "second chair", "person with a very long and winding description", "sign")


def write_yesno(folder: Path, images: int, each: int = 3) -> Path:
    """`each` questions about every picture, of several lengths; a last one has no picture."""
    (folder / "images").mkdir(parents=True)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for n in range(images):
            (folder / "images" / f"{n}.png").write_bytes(image_bytes(n, (20, 16)))
            for k in range(each):
                word = WORDS[(n + k) % len(WORDS)]
                line = {"id": f"{n}-{k}", "image": f"{n}.png", "question": f"Is there a {word} in the picture?"}
                file.write(json.dumps(line | {"answer": "yes" if k % 2 else "no"}) + "\n")
        file.write(json.dumps({"id": "last", "question": "Is one one?", "answer": "yes"}) + "\n")
    return folder / "questions.jsonl"


def write_mcq(folder: Path, images: int) -> Path:
    """A question with four options about every picture."""
    (folder / "images").mkdir(parents=True)
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for n in range(images):
            (folder / "images" / f"{n}.png").write_bytes(image_bytes(n, (20, 16)))
            options = [WORDS[(n + k) % len(WORDS)] for k in range(4)]
            line = {"id": str(n), "image": f"{n}.png", "question": f"What is number {n}?", "options": options}
            file.write(json.dumps(line | {"answer": "ABCD"[n % 4]}) + "\n")
    return folder / "questions.jsonl"


def write_mme(folder: Path, images: int) -> Path:
    """MME's release in small: the tools' empty forms, and a folder of images for each task."""
    forms = folder / "eval_tool" / "Your_Results"
    forms.mkdir(parents=True)
    for number, task in enumerate(TASKS):
        (folder / task).mkdir()
        lines = []
        for n in range(images):
            (folder / task / f"{n}.jpg").write_bytes(image_bytes(100 * number + n, (20, 16)))
            for truth in ("Yes", "No"):
                word = WORDS[(n + (truth == "No")) % len(WORDS)]
                lines.append(f"{n}.jpg\tIs this a {word}? Please answer yes or no.\t{truth}\n")
        (forms / f"{task}.txt").write_text("".join(lines))
    return folder
