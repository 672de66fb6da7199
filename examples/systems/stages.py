"""What each system does on the small world, as stages of public commands in a folder beside the quickstart's own.

RUNS/systems/world, prompts    new scenes, and instructions about them that the model answers itself
RUNS/systems/vdpo, spa, ...    a folder a system
RUNS/systems/greedy, sampled   what was measured of each, as the quickstart has it
"""

import os
from dataclasses import dataclass
from pathlib import Path

from examples import quickstart
from examples.road import Road, pool_of
from examples.world.pool import write_configs

HERE = Path(os.path.relpath(Path(__file__).parent))


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        vdpo_steps: updates of V-DPO, as many as the quickstart's DPO has.
        prompts: instructions that the model answers itself, about as many new scenes.
        own_steps: updates on what comes of these answers.
        spa_seed: updates of SPA's first round, on labelled pairs.
        rounds: of SPA, after its first, and of CSR.
        spa_take, csr_take: instructions of each of these.
    """

    vdpo_steps: int = quickstart.Sizes().dpo_steps
    prompts: int = 160
    own_steps: int = 80
    spa_seed: int = 48
    rounds: int = 2
    spa_take: int = 80
    csr_take: int = 60


FAST = Sizes(vdpo_steps=2, prompts=12, own_steps=2, spa_seed=2, rounds=1, spa_take=8, csr_take=4)

RUNS = {
    "vdpo": "vdpo",
    "spa": "spa/round-{:02d}/train",
    "sima": "sima/train",
    "csr": "csr/round-{:02d}/train",
    "rejection": "rejection",
    "steerlm": "steerlm",
}
"""System -> its training run, of rounds the last one's."""
ABOUT = {
    "vdpo": "V-DPO: the quickstart's pairs, and a reward that asks how much the picture mattered",
    "spa": "SPA: a seed of labelled pairs, then two rounds in which the model judges its own answers",
    "sima": "SIMA: its greedy answer and a sampled one, and a critic that knows the right one",
    "csr": "CSR: answers that grow sentence by sentence, judged by their likeness to the picture; two rounds",
    "attributes": "Four answers of its own to each instruction, rated by five attributes",
    "rejection": "Rejection sampling: the best of the four is imitated where it is good enough",
    "steerlm": "SteerLM: all four are imitated, each below its ratings",
}


def take(road: Road[Sizes]) -> None:
    """All stages, beside a quickstart that is done; the road's folder is `systems` in that one's."""
    silkie, folder, sizes, given = road.silkie, road.folder, road.sizes, road.folder.parent
    world, prompts, sft, corpus = folder / "world", folder / "prompts", given / "sft", given / "corpus"

    def prepare() -> None:
        numbers = ["--scenes", str(sizes.prompts), "--held-out", "1", "--seed", str(road.seed + 1)]
        road.python("examples.world.make", world, *numbers, "--answers")
        silkie("corpus", "instructions", world / "instructions.jsonl", prompts, "--images", world)

    def train(config: str, corpus: Path, run: Path, steps: int) -> None:
        words = [f"model={sft}", f"corpus={corpus}", f"run_dir={run}", f"seed={road.seed}", f"steps={steps}"]
        silkie("train", HERE / f"{config}.yaml", *words)

    def ask(name: str) -> None:
        """The model's own answers to all prompts, and what the world's judge makes of them."""
        run = folder / name / "run"
        with pool_of(world, road.seed) as url:
            pool, judge = _written(name, folder, url, sft)
            if not run.exists():
                silkie("corpus", "take", prompts, run)
            silkie("corpus", "respond", run, "--pool", pool)
            silkie("corpus", "rate", run, "--judge", judge)
        silkie("corpus", "build", run, folder / name / "corpus")

    def iterate(name: str, *others: str) -> None:
        words = [f"run_dir={folder / name}", f"start.model={sft}", f"instructions={prompts}"]
        words += [f"rounds={sizes.rounds}", f"seed={road.seed}"]
        silkie("iterate", HERE / f"{name}.yaml", *words, *others)

    def spa() -> None:
        first = [f"first.corpus={corpus}", f"first.train.steps={sizes.spa_seed}"]
        iterate("spa", f"take={sizes.spa_take}", *first)

    def sima() -> None:
        ask("sima")
        train("sima", folder / "sima" / "corpus", folder / "sima" / "train", sizes.own_steps)

    def csr() -> None:
        with pool_of(world, road.seed) as url:
            pool, judge = _written("csr", folder, url)
            iterate("csr", f"take={sizes.csr_take}", f"respond={pool}", f"rate=[{judge}]")

    def imitate(name: str) -> None:
        train(name, folder / "attributes" / "corpus", folder / name, sizes.own_steps)

    def measure(name: str) -> None:
        asked: list[str | Path] = ["--model", sft, "--adapter", folder / RUNS[name].format(sizes.rounds) / "adapter"]
        asked += ["--data", given / "world" / "evaluation", "--dtype", "float32", "--max-new-tokens", "96"]
        asked += ["--limit", str(quickstart.QUESTIONS)]
        if name == "steerlm":
            asked += ["--after", folder / "steerlm" / "condition.txt"]
        silkie("evaluate", "run", "objects", "pope", *asked, "--out", folder / "greedy" / name)
        sampled: list[str | Path] = ["--temperature", "1", "--seed", str(road.seed), "--out", folder / "sampled" / name]
        silkie("evaluate", "run", "objects", *asked, *sampled)

    road.stage("prompts", "New scenes, for the model to answer questions about", prepare)
    works = {
        "vdpo": lambda: train("vdpo", corpus, folder / "vdpo", sizes.vdpo_steps),
        "spa": spa,
        "sima": sima,
        "csr": csr,
        "attributes": lambda: ask("attributes"),
        "rejection": lambda: imitate("rejection"),
        "steerlm": lambda: imitate("steerlm"),
    }
    for name, work in works.items():
        road.stage(name, ABOUT[name], work)
    for name in RUNS:
        about = f"Measured on scenes whose contents no training has seen: {name}"
        road.stage(f"measure-{name}", about, lambda name=name: measure(name))  # type: ignore[misc]


def _written(name: str, folder: Path, url: str, model: Path | None = None) -> list[Path]:
    """Copies of a system's pool and judge with the server's address and, but for rounds, the model that answers."""
    written = write_configs(folder / "configs", url, [HERE / f"{name}-{what}.yaml" for what in ("pool", "judge")])
    if model is not None:
        pool = written[0].read_text(encoding="utf-8")
        written[0].write_text(pool.replace("local: policy", f"local: {model}"), encoding="utf-8")
    return written
