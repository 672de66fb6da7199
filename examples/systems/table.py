"""What came of each system: how the model describes and answers afterwards, and what that took."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_prep.run import RATE, Run, similar_name
from examples.road import change, markdown, seconds, shown
from examples.systems.stages import HERE
from silkie_jax.corpus import CorpusReader
from silkie_jax.corpus.imitation import imitated
from silkie_jax.corpus.pairs import pairs
from silkie_jax.evaluation.report.runs import Checkpoint, read_run
from silkie_jax.yaml_files import read_extended

FIGURES = (
    ("greedy", "objects", "CHAIRi", "CHAIR-i, greedy"),
    ("sampled", "objects", "CHAIRi", "CHAIR-i, T = 1"),
    ("greedy", "objects", "coverage", "coverage, greedy"),
    ("sampled", "objects", "coverage", "coverage, T = 1"),
    ("greedy", "pope", "accuracy", "POPE"),
    ("greedy", "objects", "words", "words"),
)
"""Columns: decoding, benchmark, figure, and what it is called."""
TOOK = ("pairs", "requests", "minutes")
LEGEND = """\
CHAIR-i: of all objects named, the share that is not there; coverage: of all objects there, the share that is named;
POPE: accuracy of yes and no, chance being 0.5; words: of a greedy description. In parentheses the 95 % interval of the
change against the model before, the same scenes for both. pairs: of responses that are compared (of rejection sampling
and SteerLM: answers that are imitated; of SPA: beside its seed); requests: to judges; minutes: of answering, judging
and training, not of measuring.
"""


@dataclass(frozen=True)
class Row:
    """A system.

    Attributes:
        name: in the table.
        measured: the folder with `greedy` and `sampled`, and its name there.
        corpora: what it was trained on.
        config: the training config that says what is made of them.
        runs: whose judges' requests count.
        stages: folder and stage of the time that it took.
    """

    name: str
    measured: tuple[Path, str]
    corpora: tuple[Path, ...] = ()
    config: str = ""
    runs: tuple[Path, ...] = ()
    stages: tuple[tuple[Path, str], ...] = ()


def rows(given: Path, rounds: int) -> list[Row]:
    """All systems, from the folder of the quickstart, and how many rounds SPA and CSR took."""
    folder = given / "systems"
    four = folder / "attributes"
    asked = [(given, stage) for stage in ("ask", "build", "reference")]

    def each(name: str, inside: str) -> tuple[Path, ...]:
        return tuple(folder / name / f"round-{number:02d}" / inside for number in range(1, rounds + 1))

    def took(*stages: str) -> tuple[tuple[Path, str], ...]:
        return tuple((folder, stage) for stage in ("prompts", *stages))

    labelled = (given / "corpus",), "vdpo", (given / "answers",)
    rated = (four / "corpus",), (four / "run",)
    spa, csr = ((each(name, "corpus"), f"{name}-train", each(name, "run")) for name in ("spa", "csr"))
    sima = (folder / "sima" / "corpus",), "sima", (folder / "sima" / "run",)
    return [
        Row("before", (given, "sft")),
        Row("DPO", (given, "dpo"), *labelled, (*asked, (given, "dpo"))),
        Row("V-DPO", (folder, "vdpo"), *labelled, (*asked, (folder, "vdpo"))),
        Row("SPA", (folder, "spa"), *spa, took("spa")),
        Row("SIMA", (folder, "sima"), *sima, took("sima")),
        Row("CSR", (folder, "csr"), *csr, took("csr")),
        Row(
            "rejection sampling",
            (folder, "rejection"),
            rated[0],
            "rejection",
            rated[1],
            took("attributes", "rejection"),
        ),
        Row("SteerLM", (folder, "steerlm"), rated[0], "steerlm", rated[1], took("attributes", "steerlm")),
    ]


def table(given: Path, rounds: int) -> str:
    """All systems as Markdown, a line each, with what the columns mean."""
    found = rows(given, rounds)
    before = _measured(found[0])
    lines = [["", *(about for *_, about in FIGURES), *TOOK]]
    for row in found:
        measured = _measured(row)
        cells = [row.name]
        for decoding, benchmark, figure, _ in FIGURES:
            now, then = measured[decoding].measured[benchmark], before[decoding].measured[benchmark]
            cell = shown(now, figure)
            if row is not found[0] and "–" not in cell:  # who names nothing has no share of what is not there
                cell += f" ({change(then, now, figure).partition(' (')[2]}"
            cells.append(cell)
        minutes = sum(seconds(folder, stage) for folder, stage in row.stages) / 60
        learned = sum(_learned(corpus, row.config) for corpus in row.corpora)
        numbers = [f"{learned:,}", f"{sum(map(_requests, row.runs)):,}", f"{minutes:.1f}"]
        lines.append([*cells, *(numbers if row.config else [""] * len(TOOK))])
    return f"{markdown(lines)}\n{LEGEND}"


def _measured(row: Row) -> Mapping[str, Checkpoint]:
    folder, name = row.measured
    return {decoding: read_run(str(folder / decoding / name)) for decoding in ("greedy", "sampled")}


def _learned(corpus: Path, name: str) -> int:
    """Pairs of a corpus under a training config's rule, or the answers that it imitates."""
    config: Any = read_extended(HERE / f"{name}.yaml")
    records: Iterable[Any] = CorpusReader(corpus)
    if config.objective == "sft":
        return sum(len(imitated(record, _plain(config.imitate), [])) for record in records)
    return sum(len(pairs(record, _plain(config.pair_rule))) for record in records)


def _requests(run: Path) -> int:
    """Requests to judges of answers, those among them that a search makes of each level."""
    with Run.open(run) as opened:
        sql = "SELECT count(*) FROM requests WHERE stage = ? OR agent = ?"
        return opened.db.execute(sql, (RATE, similar_name("own"))).fetchone()[0]


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
