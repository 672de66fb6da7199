"""`silkie evaluate answer`, `judge` and `run`: the road from a checkpoint to its table.

A run's folder has a folder for each benchmark: answers.jsonl, replies.jsonl where a judge was asked, score.json, and
outcomes.jsonl with how each item came out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silkie_jax.endpoints.stage import Options
from silkie_jax.errors import UserError
from silkie_jax.evaluation.running.endpoint import Endpoint
from silkie_jax.evaluation.running.judging import judge as ask_judge
from silkie_jax.evaluation.running.questions import AnswerOptions, Questions, open_questions
from silkie_jax.evaluation.running.replies import write_replies
from silkie_jax.evaluation.running.scoring import check_settings, read_all, score_answers, write_json, write_outcomes
from silkie_jax.evaluation.table import find_benchmark

ANSWERS, REPLIES, SCORE, OUTCOMES = "answers.jsonl", "replies.jsonl", "score.json", "outcomes.jsonl"


@dataclass(frozen=True)
class Model:
    """A model on this machine."""

    path: str
    adapter: str | None = None
    dtype: str = "bfloat16"
    quantize: str | None = None
    mesh: tuple[int, int, int] = (-1, 1, 1)
    slots: int | None = None


def answer_all(asker: Model | Endpoint, asked: Sequence[tuple[Questions, Path]], say: Callable[[str], None]) -> None:
    """Answers several benchmarks; a model is loaded once.

    Raises:
        UserError, KeyboardInterrupt: as `LocalModel.answer` and `Endpoint.answer`.
    """
    if isinstance(asker, Endpoint):
        for questions, out in asked:
            asker.answer(questions, out, say)
        return
    from silkie_jax.evaluation.running.local import LocalModel
    from silkie_jax.hardware.programs import kept_programs, users_folder

    with kept_programs(users_folder()):
        model = LocalModel(
            asker.path,
            [questions for questions, _ in asked],
            adapter=asker.adapter,
            dtype=asker.dtype,
            quantize=asker.quantize,
            mesh=asker.mesh,
            slots=asker.slots,
            say=say,
        )
        for questions, out in asked:
            model.answer(questions, out)


def judge(
    name: str,
    answers: Path,
    out: Path,
    config: Path,
    options: Options,
    *,
    data: Path | None = None,
    runs: int = 1,
    settings: dict[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> Path | None:
    """Asks a judge about a file of answers and writes its replies; requests and replies lie in `out`.run/.

    Returns:
        the file of replies; None after a dry run.

    Raises:
        UserError: the benchmark has no judge, or as `judging.judge`.
    """
    benchmark, given = find_benchmark(name), dict(settings or {})
    check_settings(name, benchmark, given)
    if benchmark.ABOUT.judge is None:
        raise UserError(f"{name} has no judge: score it without")
    if not answers.exists():
        raise UserError(f"{answers}: no such file or folder")
    _, items, found = read_all(name, benchmark, answers, data, given)
    folder = out.with_name(out.name + ".run")
    replies = ask_judge(
        name, items, found, given, config, folder, options, runs, report=lambda stage: say(stage.table())
    )
    if options.dry_run:
        return None
    write_replies(out, replies)
    return out


def run(
    names: Sequence[str],
    data: Sequence[str],
    out: Path,
    asker: Model | Endpoint,
    asking: dict[str, Any],
    *,
    judge_config: Path | None,
    judging: Options,
    runs: int = 1,
    parser: str | None = None,
    settings: dict[str, str] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Answers, judges and scores; whatever is there from before stays.

    Raises:
        UserError: what is wrong, in one line.
        KeyboardInterrupt: interrupted; the same command continues.
    """
    places = data_of(names, data)
    asked = []
    for name in names:
        about = find_benchmark(name).ABOUT
        own = {key: value for key, value in (settings or {}).items() if key in about.settings}
        folder = out / name
        questions = open_questions(name, places[name], AnswerOptions(**asking, settings=own))
        folder.mkdir(parents=True, exist_ok=True)
        asked.append((questions, folder / ANSWERS))
    answer_all(asker, asked, say)
    for questions, answers in asked:
        name, about = questions.origin.benchmark, questions.benchmark.ABOUT
        own, where, replies = dict(questions.origin.settings), places[name], None
        if about.judge is not None and judge_config is not None:
            replies = judge(
                name,
                answers,
                answers.with_name(REPLIES),
                judge_config,
                judging,
                data=places[name],
                runs=runs,
                settings=own,
            )
            if replies is None:
                continue
        elif about.judge is not None and not about.judge_optional and parser in (None, about.parsers[0]):
            say(f"{name}: answered; its score needs a judge (as officially {about.judge}): give --judge FILE.yaml")
            continue
        scored = score_answers(name, answers, data=where, replies=replies, parser=parser, settings=own)
        write_outcomes(answers.with_name(OUTCOMES), scored)
        write_json(answers.with_name(SCORE), scored.as_dict())
        say("\n".join(scored.lines()))


def data_of(names: Sequence[str], given: Sequence[str]) -> dict[str, Path]:
    """Where each benchmark's data lies: `mme=PATH` for one, or a folder with a folder for each.

    Raises:
        UserError: a benchmark has none, or the name is of no benchmark that is asked for.
    """
    found: dict[str, Path] = {}
    common = None
    for text in given:
        name, equals, path = text.partition("=")
        if equals and name in names:
            found[name] = Path(path)
        elif equals and not Path(text).exists():
            raise UserError(f"--data {text!r}: {name!r} is none of {', '.join(names)}")
        else:
            common = Path(text)
    for name in names:
        if name not in found and common is None:
            raise UserError(f"--data: nothing for {name}; add {name}=PATH")
        if name not in found and common is not None:
            inside = common / name
            found[name] = inside if inside.exists() or len(names) > 1 else common
    return found
