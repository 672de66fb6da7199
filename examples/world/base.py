"""Makes the base of the small world: a Qwen-VL of 2.1 million parameters that sees, by public commands alone.

    python -m examples.world.base FOLDER

takes about an hour on two cores and may be killed at any time: the same command goes on where it ended. Each stage
writes rows about training scenes (curriculum.py), makes a corpus of them and trains on it what the stage before left:

    silkie corpus import --jsonl ROWS --images DIR CORPUS
    silkie train base.yaml model=BEFORE corpus=CORPUS run_dir=RUN ...

The last stage's model is exported to FOLDER/base. What is shipped in examples/world/base was made so; its card says
what it can and what it cannot.
"""

import hashlib
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.world.curriculum import write_rows
from examples.world.start import grow, make_start

CONFIG = Path(__file__).with_name("base.yaml")
SHIPPED = Path(__file__).with_name("base")
FINGERPRINT = "cd1e8d270e5f9c476b036c5f3e93860fc193f55211c19c4fc09ae1dd03f5bec2"
"""Of what is shipped."""
SILKIE = Path(sys.executable).with_name("silkie")
DEVICES = 2
"""Of the mesh: JAX takes each for a device, so that both cores are used. Another number gives other bytes."""
DTYPE = "bfloat16"
"""What the weights are shipped in: half of the bytes, and training keeps what it changes in float32 anyway."""


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    Attributes:
        name: of its folder.
        lessons: lesson of curriculum.py -> its share of the rows.
        steps: updates of eight rows; so many rows are drawn that none comes twice.
        more: layers that the decoder is given before.
        keys: what differs from base.yaml.
    """

    name: str
    lessons: dict[str, float]
    steps: int
    more: int = 0
    keys: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return ROWS_PER_STEP * self.steps


ROWS_PER_STEP = 8
FROZEN = ("train_vision=none", "optimizer.vision_learning_rate=null", "optimizer.resampler_learning_rate=null")
STAGES = (
    Stage("describing", {"describing": 1.0}, 1000, keys=FROZEN),
    Stage("tabling", {"tabling": 1.0}, 500, more=2),
    Stage(
        "answering",
        {"describing": 1.0, "tabling": 1.5, "checking": 1.0, "looking": 1.0, "answering": 1.5},
        1000,
        keys=("optimizer.schedule=cosine",),
    ),
    Stage(
        "asking",
        {"asking": 3.0, "answering": 1.0, "chatting": 4.0},
        600,
        keys=("optimizer.schedule=cosine",),
    ),
)


def silkie(*arguments: str | Path) -> None:
    """Show a `silkie` command and run it; end here if it fails."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ silkie {shlex.join(words)}", flush=True)
    if status := subprocess.run([SILKIE, *words]).returncode:
        sys.exit(f"base: `silkie {words[0]}` ended with status {status}")


def run_stage(folder: Path, stage: Stage, before: Path, seed: int) -> Path:
    """Do what is still to be done of a stage in `folder`; returns its model."""
    run = folder / "run"
    if not (folder / "rows.jsonl").exists():
        print(f"{stage.name}: drawing {stage.rows:,} rows", flush=True)
        write_rows(folder, stage.lessons, stage.rows, seed)
    corpus = folder / "corpus"
    silkie("corpus", "import", "--jsonl", folder / "rows.jsonl", "--images", folder, corpus)
    silkie(
        "train", CONFIG, f"model={before}", f"corpus={corpus}", f"run_dir={run}", f"steps={stage.steps}", *stage.keys
    )
    return run / "model"


def deepen(folder: Path, before: Path, more: int) -> Path:
    """Give the decoder of a trained model more layers; returns the checkpoint that a stage starts from."""
    exported, grown = folder / "before", folder / "start"
    if not exported.exists():
        silkie("export", before.parent, exported, "--dtype", "float32")
    if not (grown / "config.json").exists():
        grow(exported, grown, more)
    return grown


def make_base(folder: Path, stages: tuple[Stage, ...] = STAGES) -> Path:
    """Make the base in `folder`, or what is still to be made of it; returns its checkpoint in the official form."""
    model = folder / "start"
    if not (model / "config.json").exists():
        make_start(model)
    for seed, stage in enumerate(stages):
        if stage.more:
            model = deepen(folder / stage.name, model, stage.more)
        model = run_stage(folder / stage.name, stage, model, seed)
    base = folder / "base"
    if not (base / "config.json").exists():
        silkie("export", folder / stages[-1].name / "run", base, "--dtype", DTYPE)
    return base


def fingerprint(base: Path) -> str:
    """SHA-256 of a checkpoint's files and their names, whatever its card says."""
    digest = hashlib.sha256()
    for file in sorted(base.iterdir()):
        if file.suffix != ".md":
            digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def main() -> None:
    """Make the base in the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))  # stages share their programs
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={DEVICES}")
    base = make_base(folder)
    size, same = sum(file.stat().st_size for file in base.iterdir()), fingerprint(base) == FINGERPRINT
    print(f"\n{base}: {size / 1e6:.1f} MB, {'the same bytes as' if same else 'other bytes than'} examples/world/base")


if __name__ == "__main__":
    main()
