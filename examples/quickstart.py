"""Preference distillation from end to end on two CPU cores: a model that invents what it says it sees, and DPO that
teaches it not to, with the evidence.

    python -m examples.quickstart [FOLDER] [--seed N] [--fast]        (runs/quickstart if left out)

Models with known faults answer questions about small pictures, a judge with known faults rates their answers, and a
small Qwen-VL (examples/world/base) first learns to answer as the models do, then what the judge prefers. Every step is
a public command, shown as it runs. Pictures, models and judge stand in for photographs, the twelve models of VLFeedback
and GPT-4V, and are asked through the client that asks the real ones; no key, no download and no accelerator is needed.

What is measured is measured on scenes whose contents occur nowhere in training. Killed at any moment, the same command
continues. docs/quickstart.md explains every step; `--fast` takes the same road in small, where numbers mean nothing.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from examples.road import BASE, Road, change, markdown, pool_of, shown, use_two_cores
from examples.world.pool import write_configs
from silkie_jax.evaluation.report.runs import Measured, read_run

HERE = Path(os.path.relpath(Path(__file__).parent))
SFT, DPO = HERE / "quickstart-sft.yaml", HERE / "quickstart-dpo.yaml"
SEED = 12
BEST_MODEL = "faithful"
"""Of the pool, for the paper's second heuristic: GPT-4V there."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything: scenes to ask about, scenes to measure on, and updates of the two trainings."""

    scenes: int = 450
    held_out: int = 100
    sft_steps: int = 140
    dpo_steps: int = 180


FAST = Sizes(scenes=40, held_out=6, sft_steps=4, dpo_steps=4)

RULES = {
    "dpo": "mean_rating",
    "longest": "longest_as_best",
    "one-model": f"{{name: model_as_best, model: {BEST_MODEL}}}",
}
"""Folder of a DPO run -> how pairs are made: by the ratings, and by the paper's two heuristics that need no judge."""
NAMES = {"sft": "before", "dpo": "DPO", "longest": "longest as best", "one-model": "one model as best"}
"""Folder of a model -> its name in reports and in the table."""
YES_NO = ("sft", "dpo")
"""What is asked POPE's and MME's questions, too."""
ROWS = (
    ("greedy", "objects", "CHAIRi", "said but not there (CHAIR-i), greedy"),
    ("sampled", "objects", "CHAIRi", "said but not there (CHAIR-i), T = 1"),
    ("greedy", "objects", "coverage", "there and said (coverage), greedy"),
    ("sampled", "objects", "coverage", "there and said (coverage), T = 1"),
    ("greedy", "objects", "words", "words of a description, greedy"),
    ("sampled", "objects", "words", "words of a description, T = 1"),
    ("greedy", "pope", "accuracy", "POPE (yes or no), accuracy"),
    ("greedy", "mme", "perception", "MME (yes or no), points of 1,000"),
)
"""Lines of the table: decoding, benchmark, figure, and what it is."""


def begin(folder: Path, seed: int, sizes: Sizes) -> Road[Sizes]:
    """The road in a folder, or what is left of it; ends the program where the folder is of something else."""
    world = [path for path in (HERE / "world").iterdir() if path.suffix in (".py", ".yaml")]
    return Road("quickstart", folder, seed, sizes, [SFT, DPO, *world])


def take(road: Road[Sizes]) -> None:
    """All stages."""
    silkie, folder, sizes = road.silkie, road.folder, road.sizes
    world, answers, corpus = folder / "world", folder / "answers", folder / "corpus"
    weights, sft = folder / "weights", folder / "sft"
    common = [f"corpus={corpus}", f"seed={road.seed}"]

    def make_world() -> None:
        numbers = {"--scenes": sizes.scenes, "--held-out": sizes.held_out, "--seed": road.seed}
        road.python("examples.world.make", world, *(text for pair in numbers.items() for text in map(str, pair)))

    def ask() -> None:
        with pool_of(world, road.seed) as url:
            models, judge = write_configs(folder / "configs", url)
            silkie("corpus", "instructions", world / "instructions.jsonl", answers, "--images", world)
            silkie("corpus", "respond", answers, "--pool", models)
            silkie("corpus", "rate", answers, "--judge", judge)

    def build() -> None:
        silkie("corpus", "build", answers, corpus)
        silkie("corpus", "report", corpus, "--run", answers)

    def imitate() -> None:
        if not weights.exists():
            silkie("convert", BASE, weights)
        run = folder / "sft-run"
        silkie("train", SFT, f"model={weights}", *common, f"run_dir={run}", f"steps={sizes.sft_steps}")
        if not sft.exists():
            silkie("export", run, sft)

    def refer() -> None:
        silkie("reference", DPO, f"model={sft}", *common, f"run_dir={folder / 'dpo'}")

    def prefer(name: str) -> None:
        rule = f"pair_rule={RULES[name]}"
        silkie("train", DPO, f"model={sft}", *common, rule, f"steps={sizes.dpo_steps}", f"run_dir={folder / name}")

    def measure(name: str) -> None:
        asked: list[str | Path] = ["--model", sft, "--data", world / "evaluation"]
        asked += [] if name == "sft" else ["--adapter", folder / name / "adapter"]
        asked += ["--dtype", "float32", "--max-new-tokens", "96", "--limit", str(QUESTIONS)]
        yes_no = ["pope", "mme", "--set", f"tasks={MME_TASKS}"] if name in YES_NO else []
        silkie("evaluate", "run", "objects", *yes_no, *asked, "--out", folder / "greedy" / name)
        sampled = ["--temperature", "1", "--seed", str(road.seed)]
        silkie("evaluate", "run", "objects", *asked, *sampled, "--out", folder / "sampled" / name)

    def report() -> None:
        for decoding in ("greedy", "sampled"):
            runs = [f"{said}={folder / decoding / name}" for name, said in NAMES.items()]
            silkie("evaluate", "report", *runs, "--out", folder / f"{decoding}.html")
        if not (folder / "silkie-small").exists():
            silkie("export", folder / "dpo", folder / "silkie-small")

    road.stage("world", "A small world: pictures of coloured shapes, and what is asked about them", make_world)
    road.stage("ask", "Nine models with habits of their own answer, and a judge rates what they say", ask)
    road.stage("build", "Answers and ratings become a corpus, and a report on it", build)
    road.stage("sft", "A small Qwen-VL learns to answer as the models do, and to invent as they do", imitate)
    road.stage("reference", "What it makes of every answer, once: the reference of DPO", refer)
    road.stage("dpo", "DPO on the ratings: of four answers, those rated higher are preferred", lambda: prefer("dpo"))
    road.stage(
        "longest", "Beside it the paper's first heuristic: the longest answer is the best", lambda: prefer("longest")
    )
    road.stage(
        "one-model",
        f"And its second: the answer of one model ({BEST_MODEL}) is the best",
        lambda: prefer("one-model"),
    )
    for name, said in NAMES.items():
        about = f"Measured on {sizes.held_out} scenes whose contents no training has seen: {said}"
        road.stage(f"measure-{name}", about, lambda name=name: measure(name))  # type: ignore[misc]
    road.stage("report", "Side by side", report)
    written = table(folder)
    (folder / "table.md").write_text(written, encoding="utf-8")
    print(f"\n{written}")
    chat(road)


QUESTIONS = 300
"""About so many of each benchmark are asked, drawn by scene: of POPE a fifth, of MME a third."""
MME_TASKS = "existence,count,position,color,OCR"
"""Those of MME's 14 that can be asked about shapes."""


def table(folder: Path) -> str:
    """What came of it as Markdown; the change is DPO's, with its 95 % interval by bootstrap over scenes."""
    runs = {
        (decoding, name): read_run(str(folder / decoding / name))
        for decoding in ("greedy", "sampled")
        for name in NAMES
    }

    def measured(decoding: str, name: str, benchmark: str) -> Measured | None:
        return runs[decoding, name].measured.get(benchmark)

    columns = [NAMES["sft"], NAMES["dpo"], "change (95 %)", NAMES["longest"], NAMES["one-model"]]
    cells = []
    for decoding, benchmark, figure, about in ROWS:
        found = {name: measured(decoding, name, benchmark) for name in NAMES}
        figures = [shown(found[name], figure) for name in NAMES]
        before, after = found["sft"], found["dpo"]
        assert before is not None
        assert after is not None
        cells.append([about, *figures[:2], change(before, after, figure), *figures[2:]])
    return markdown([["", *columns], *cells])


def chat(road: Road[Sizes]) -> None:
    """Ask the exported model about the held-out picture whose description was mended most."""
    before, after = (
        read_run(str(road.folder / "greedy" / name)).measured["objects"].outcomes for name in ("sft", "dpo")
    )
    mended = [id for id in after if id in before and after[id].outcome > before[id].outcome]
    if not mended:
        return
    was = before[mended[0]]
    picture = road.folder / "world" / "evaluation" / "objects" / "images" / was.image
    print(f"\nOf {was.image}, which shows {', '.join(json.loads(was.truth))}, it said before DPO:\n{was.answer}\nNow:")
    options = ["--prompt", was.question, "--greedy", "--max-new-tokens", "96", "--dtype", "float32"]
    road.silkie("chat", road.folder / "silkie-small", "--image", picture, *options)


def main() -> int:
    """Take the road in the folder named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/quickstart"))
    parser.add_argument(
        "--seed", type=int, default=SEED, help="of scenes, models, judge and training; default %(default)s"
    )
    parser.add_argument("--fast", action="store_true", help="the same road in small; its numbers mean nothing")
    args = parser.parse_args()
    began = time.monotonic()
    road = begin(args.folder, args.seed, FAST if args.fast else Sizes())
    use_two_cores(args.folder)
    try:
        take(road)
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; the same command continues", file=sys.stderr)
        return 130
    print(f"""
Done in {time.monotonic() - began:.0f} s. In {args.folder}:
  greedy.html, sampled.html   the models side by side: figures, and answers that differ with their pictures
  corpus/report.html          the corpus: ratings, models, lengths, examples
  table.md                    the table above
  silkie-small/               the model after DPO in the official form; dpo/adapter/ is what was trained, in PEFT's form
Next: docs/quickstart.md explains every step. README.md names the same commands for Qwen-VL-Chat and VLFeedback.""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
