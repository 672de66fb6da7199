"""Makes a folder of the small world: pictures, what they show, what is asked, and held-out evaluation data.

    python -m examples.world.make DIR --scenes 400 --seed 0 [--held-out 100] [--split test]

writes plain files, the same for the same arguments:

    scenes.jsonl              what every picture shows; the pool and the judge answer from it
    images/                   JPEG and PNG
    instructions.jsonl        {id, image, prompt}, for `silkie corpus instructions DIR/instructions.jsonl RUN`;
                              with --answers the true answer, too, for judges that are shown it
    evaluation/               of other scenes, none of whose contents occur above:
      scenes.jsonl
      pope/                   coco_pope_{random,popular,adversarial}.json and images/
      mme/                    {task}.txt with two questions a picture, and {task}/ with the pictures
      objects/                images.jsonl, vocabulary.json and images/: descriptions, scored as CHAIR does

for `silkie evaluate run pope mme objects --data DIR/evaluation --set tasks=existence,count,position,color,OCR`.
"""

import argparse
import hashlib
import itertools
import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.world import questions
from examples.world.drawing import encode
from examples.world.questions import Question
from examples.world.reading import DREAMS
from examples.world.scenes import COLOURS, SHAPES, SPLITS, Scene, scenes

MARKER = ".made-by-world"
MME_TASKS = ("existence", "count", "position", "color", "OCR")
"""Those of MME's 14 tasks that can be asked about shapes."""
SEEN = {"existence": 4, "color": 2}
"""How often what is answered with yes or no is of these tasks, beside once of each other.

The base sees colours best, and what it does not see teaches it nothing but a leaning to either answer. For the same
reason what is asked for in vain has a colour that is not there.
"""
DESCRIPTIONS = 0.6
"""Share of the instructions that ask for a description; of the others two thirds are to be answered with yes or no."""


def make_world(
    folder: Path,
    count: int,
    seed: int = 0,
    held_out: int = 100,
    split: str = "test",
    each: int = 1,
    answers: bool = False,
) -> Path:
    """Write everything under `folder` and return it.

    Args:
        folder: made anew where this function made it before.
        count: scenes to ask about.
        seed: of scenes and questions, held-out ones too.
        held_out: scenes of the evaluation data.
        split: which of the held-out splits they belong to: "tune" to choose settings by, "test" to report.
        each: instructions about each scene, no two of which are alike.
        answers: whether the true answer stands beside each.

    Raises:
        ValueError: `split` is no held-out split.
        FileExistsError: the folder holds something else.
    """
    if split not in SPLITS or split == "train":
        raise ValueError(f"split {split!r}: name a held-out one")
    if (folder / MARKER).exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and was not made by this program; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()

    rng = random.Random(f"{seed} instructions")
    shown = _write_scenes(folder, itertools.islice(scenes(seed, "train"), count), "scene")
    lines = []
    wanted: Wanted = defaultdict(lambda: itertools.cycle((True, False)))
    for name, scene in shown.items():
        for number, text in enumerate(_instructions(scene, rng, each, wanted)):
            line = {"id": f"{Path(name).stem}-{number}", "image": f"images/{name}", "prompt": text}
            lines.append(line | ({"answer": questions.read(scene, text).answer} if answers else {}))
    _write_lines(folder / "instructions.jsonl", lines)

    rng = random.Random(f"{seed} {split} evaluation")
    evaluation = folder / "evaluation"
    held = _write_scenes(evaluation, itertools.islice(scenes(seed, split), held_out), split)
    pictures = evaluation / "images"
    _write_pope(evaluation / "pope", held, rng)
    _write_mme(evaluation / "mme", held, rng, pictures)
    _write_objects(evaluation / "objects", held)
    for name in ("pope", "objects"):
        shutil.copytree(pictures, evaluation / name / "images")
    shutil.rmtree(pictures)
    return folder


def _write_scenes(folder: Path, found: Iterable[Scene], stem: str) -> dict[str, Scene]:
    """Pictures and their truth; file name -> scene."""
    (folder / "images").mkdir(parents=True)
    shown, lines = {}, []
    for number, scene in enumerate(found):
        name, data = f"{stem}-{number:05d}.{scene.format}", encode(scene)
        (folder / "images" / name).write_bytes(data)
        shown[name] = scene
        lines.append({"image": name, "sha256": hashlib.sha256(data).hexdigest(), **scene.to_json()})
    _write_lines(folder / "scenes.jsonl", lines)
    return shown


Wanted = Mapping[str, Iterator[bool]]
"""Task -> whether the next of its questions is to be affirmed: every other one, so that neither is the better guess."""


def _instructions(scene: Scene, rng: random.Random, each: int, wanted: Wanted) -> list[str]:
    """Different texts about one scene."""
    texts: dict[str, None] = {}
    while len(texts) < each:
        texts[_question(scene, rng, wanted).text] = None
    return list(texts)


def _question(scene: Scene, rng: random.Random, wanted: Wanted) -> Question:
    lot = rng.random()
    if lot < DESCRIPTIONS:
        return questions.description(scene, rng)
    if lot < DESCRIPTIONS + (1 - DESCRIPTIONS) / 3:
        return questions.open_question(scene, rng)
    tasks = questions.tasks_of(scene)
    (task,) = rng.choices(tasks, [SEEN.get(task, 1) for task in tasks])
    asked = questions.yes_no(scene, rng, task, yes := next(wanted[task]))
    if task == "existence" and not yes:
        there = {thing.colour for thing in scene.things}
        unlike = [name for name in questions.absent(scene) if name.split()[0] not in there]
        asked = questions.read(scene, f"Is there a {rng.choice(unlike)} in this image?")
    return questions.read(scene, asked.text + questions.YES_NO) if rng.random() < 0.5 else asked


# Evaluation data.


def _write_pope(folder: Path, held: dict[str, Scene], rng: random.Random) -> None:
    """POPE's three splits: absent things drawn at random, of the most frequent names, and of a colour or shape that is
    there (the world's likeness to what co-occurs). As many questions of a scene are to be denied as affirmed."""
    folder.mkdir(parents=True)
    often = Counter(thing.name for scene in held.values() for thing in scene.things)
    for split in ("random", "popular", "adversarial"):
        lines: list[dict[str, Any]] = []
        for name, scene in held.items():
            there = [thing.name for thing in scene.things]
            absent = questions.absent(scene)
            rng.shuffle(absent)
            if split == "popular":
                absent.sort(key=lambda one: -often[one])  # stable: ties stay drawn by lot
            elif split == "adversarial":
                words = {word for one in there for word in one.split()}
                absent.sort(key=lambda one: -sum(word in words for word in one.split()))
            pairs = itertools.chain.from_iterable(zip(there, absent, strict=False))
            for asked, label in zip(pairs, itertools.cycle(("yes", "no")), strict=False):
                text = f"Is there a {asked} in the image?"
                lines.append({"question_id": len(lines) + 1, "image": name, "text": text, "label": label})
        _write_lines(folder / f"coco_pope_{split}.json", lines)


def _write_mme(folder: Path, held: dict[str, Scene], rng: random.Random, pictures: Path) -> None:
    """MME's form: two lines a picture, image, question and answer with tabs between, one affirmed and one denied."""
    for task in MME_TASKS:
        (folder / task).mkdir(parents=True)
        lines = []
        for name, scene in held.items():
            if task not in questions.tasks_of(scene):
                continue
            shutil.copy(pictures / name, folder / task / name)
            for wanted in (True, False):
                asked = questions.yes_no(scene, rng, task, wanted)
                lines.append(f"{name}\t{asked.text}{questions.YES_NO}\t{'Yes' if wanted else 'No'}\n")
        (folder / f"{task}.txt").write_text("".join(lines), encoding="utf-8")


def _write_objects(folder: Path, held: dict[str, Scene]) -> None:
    """Descriptions: what each picture shows, and the words for everything that might be said to be there."""
    folder.mkdir(parents=True)
    lines = [
        {"image": name, "objects": [one.name for one in scene.objects], "question": questions.DESCRIBE[0]}
        for name, scene in held.items()
    ]
    _write_lines(folder / "images.jsonl", lines)
    names = [*(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES), "sign", *DREAMS]
    (folder / "vocabulary.json").write_text(json.dumps({name: [questions.plural(name)] for name in names}, indent=1))


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Make the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--scenes", type=int, default=400, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=100, metavar="N", help="scenes of the evaluation data")
    parser.add_argument("--split", default="test", choices=[name for name in SPLITS if name != "train"])
    parser.add_argument("--each", type=int, default=1, metavar="N", help="instructions about each scene")
    parser.add_argument("--answers", action="store_true", help="with the true answer to each instruction")
    args = parser.parse_args()
    try:
        made = make_world(
            args.folder, args.scenes, args.seed, args.held_out, args.split, args.each, answers=args.answers
        )
    except FileExistsError as error:
        parser.exit(1, f"{error}\n")
    print(f"{made}: {args.scenes} scenes to ask about, {args.held_out} held out")


if __name__ == "__main__":
    main()
