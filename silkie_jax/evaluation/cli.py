"""The verbs of `silkie evaluate`: parsing and calling, nothing else."""

import argparse
import json
from pathlib import Path
from typing import Any

from silkie_jax.arguments import Add, add_precision
from silkie_jax.errors import UserError
from silkie_jax.evaluation.table import BENCHMARKS


def add_verbs(add: Add) -> None:
    """Adds all verbs."""
    p = add(
        "answer",
        _answer,
        "Let a model answer a benchmark; continues where it was cut off.",
        "silkie evaluate answer mme --model exported/silkie --data benchmarks/mme --out answers.jsonl",
    )
    p.add_argument("benchmark", metavar="BENCH", help=", ".join(BENCHMARKS))
    p.add_argument("--data", required=True, metavar="PATH", help="the benchmark's data as it is distributed")
    p.add_argument("--out", required=True, metavar="FILE.jsonl")
    _add_model(p)
    _add_asking(p)
    _add_settings(p)

    p = add(
        "judge",
        _judge,
        "Let a judge rate answers; pays for nothing twice.",
        "silkie evaluate judge mmhal answers.jsonl --judge configs/judges/evaluation.yaml --out replies.jsonl",
    )
    p.add_argument("benchmark", metavar="BENCH")
    p.add_argument("answers", metavar="ANSWERS", help="made by `silkie evaluate answer`, or the benchmark's own form")
    p.add_argument("--data", metavar="PATH")
    p.add_argument("--out", required=True, metavar="FILE.jsonl", help="the replies; requests lie in FILE.jsonl.run/")
    p.add_argument("--judge", required=True, metavar="FILE.yaml", help="model, endpoint, limits and price")
    _add_judging(p)
    _add_settings(p)

    p = add(
        "score",
        _score,
        "Score answers by the official rules; needs neither a model nor a network.",
        "silkie evaluate score mmhal answers.jsonl --replies replies.jsonl",
    )
    p.add_argument("benchmark", metavar="BENCH", help=", ".join(BENCHMARKS))
    p.add_argument("answers", metavar="ANSWERS", help="made by `silkie evaluate answer`, or the benchmark's own form")
    p.add_argument("--data", metavar="PATH", help="the benchmark's data; not needed where the answers repeat it")
    p.add_argument("--replies", metavar="FILE", help="a judge's replies, recorded")
    p.add_argument("--parser", metavar="NAME", help="rules to read answers by; default: the official ones")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    _add_settings(p)

    p = add(
        "run",
        _run,
        "Answer, judge and score benchmarks; continues where it was cut off.",
        "silkie evaluate run mme pope --model exported/silkie --data benchmarks --out evals/silkie",
    )
    p.add_argument("benchmarks", nargs="+", metavar="BENCH", help=", ".join(BENCHMARKS))
    p.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="[BENCH=]PATH",
        help="of one benchmark, or a folder with a folder for each; may be given several times",
    )
    p.add_argument("--out", required=True, metavar="RUN", help="the folder to make, or to complete")
    p.add_argument("--judge", metavar="FILE.yaml", help="who rates; without it judged benchmarks are answered only")
    p.add_argument("--parser", metavar="NAME")
    _add_model(p)
    _add_asking(p)
    _add_judging(p)
    _add_settings(p)

    p = add(
        "report",
        _report,
        "Lay checkpoints side by side: one HTML page, Markdown and PNG.",
        "silkie evaluate report evals/base evals/silkie --out evaluation.html",
    )
    p.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN", help="made by `silkie evaluate run`; the first is compared with"
    )
    p.add_argument("--out", default="evaluation.html", metavar="FILE.html", help=".md and .png lie beside it")
    p.add_argument("--examples", type=int, default=12, metavar="N", help="differing answers of each benchmark")


def _add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, help="a folder; with --endpoint the name that the server knows it by")
    p.add_argument("--adapter", metavar="DIR", help="a PEFT folder")
    add_precision(p, "bfloat16")
    p.add_argument("--mesh", default="", metavar="fsdp=N,...", help="sizes of data, fsdp and tensor; default: all data")
    p.add_argument("--slots", type=int, help="replies generated together; default: what memory has room for")
    p.add_argument("--endpoint", metavar="URL", help="of an OpenAI-compatible server that answers instead")
    p.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key of --endpoint")


def _add_asking(p: argparse.ArgumentParser) -> None:
    p.add_argument("--prompt", metavar="NAME", help="wording of the questions; default: the official one")
    p.add_argument("--after", metavar="FILE", help="text that follows every question: a run's condition.txt")
    p.add_argument("--template", metavar="NAME", help="form around them: chat, bare-image or raw")
    p.add_argument("--temperature", type=float, help="0 is greedy; default: the benchmark's")
    p.add_argument("--top-p", type=float)
    p.add_argument("--max-new-tokens", type=int, help="default: the benchmark's")
    p.add_argument("--seed", type=int, default=0, help="of sampling")
    p.add_argument("--limit", type=int, metavar="N", help="ask about N questions, drawn by image; no official number")


def _add_judging(p: argparse.ArgumentParser) -> None:
    p.add_argument("--runs", type=int, default=1, metavar="N", help="how often everything is judged")
    p.add_argument("--budget", metavar="USD", help="stop before judging costs more: 20USD")
    p.add_argument("--batch", action="store_true", help="use the Batch API: half the price, within 24 hours")
    p.add_argument("--poll", type=float, default=30.0, metavar="SECONDS", help="between looks at a batch")
    p.add_argument("--dry-run", action="store_true", help="show requests, tokens and cost, and send nothing")


def _add_settings(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="NAME=VALUE", help="a setting of the benchmark"
    )


def _settings(args: argparse.Namespace) -> dict[str, str]:
    found = {}
    for text in args.settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r} is not like name=value")
        found[name] = value
    return found


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _asking(args: argparse.Namespace) -> dict[str, Any]:
    """What `AnswerOptions` is made of."""
    names = ("prompt", "template", "temperature", "top_p", "max_new_tokens", "seed", "limit")
    return {name: getattr(args, name) for name in names} | {"after": _after(args.after)}


def _after(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        text = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--after {file}: cannot be read ({e})") from None
    if not text:
        raise UserError(f"--after {file}: is empty")
    return text


def _options(args: argparse.Namespace):
    from silkie_jax.endpoints.budget import parse_usd
    from silkie_jax.endpoints.stage import Options

    if args.poll <= 0:
        raise UserError(f"--poll: {args.poll:g} is not a positive number of seconds")
    if args.runs < 1:
        raise UserError(f"--runs must be at least 1, not {args.runs}")
    budget = parse_usd(args.budget) if args.budget is not None else None
    return Options(budget, args.batch, args.dry_run, args.poll)


def _score(args: argparse.Namespace) -> None:
    from silkie_jax.evaluation.running.scoring import score_answers

    scored = score_answers(
        args.benchmark,
        Path(args.answers),
        data=_path(args.data),
        replies=_path(args.replies),
        parser=args.parser,
        settings=_settings(args),
    )
    if args.json:
        print(json.dumps(scored.as_dict(), ensure_ascii=False))
    else:
        print("\n".join(scored.lines()))


def _asker(args: argparse.Namespace):
    """What answers: a model on this machine, or a server."""
    from silkie_jax.evaluation.running.run import Endpoint, Model

    if args.endpoint:
        if args.adapter or args.quantize or args.slots or args.mesh or args.template:
            raise UserError(
                "--adapter, --quantize, --slots, --mesh and --template are of a model here, not of --endpoint"
            )
        return Endpoint(args.endpoint, args.model, args.api_key_env)
    from silkie_jax.hardware.mesh import read_mesh

    return Model(args.model, args.adapter, args.dtype, args.quantize, read_mesh(args.mesh), args.slots)


def _answer(args: argparse.Namespace) -> None:
    from silkie_jax.evaluation.running.questions import AnswerOptions, open_questions
    from silkie_jax.evaluation.running.run import answer_all

    options = AnswerOptions(**_asking(args), settings=_settings(args))
    questions = open_questions(args.benchmark, Path(args.data), options)
    answer_all(_asker(args), [(questions, Path(args.out))], print)
    print(f"answered: {args.out}")


def _judge(args: argparse.Namespace) -> None:
    from silkie_jax.evaluation.running.run import judge

    out = judge(
        args.benchmark,
        Path(args.answers),
        Path(args.out),
        Path(args.judge),
        _options(args),
        data=_path(args.data),
        runs=args.runs,
        settings=_settings(args),
    )
    if out:
        print(f"judged: {out}")


def _run(args: argparse.Namespace) -> None:
    from silkie_jax.evaluation.running.run import run

    run(
        args.benchmarks,
        args.data,
        Path(args.out),
        _asker(args),
        _asking(args),
        judge_config=_path(args.judge),
        judging=_options(args),
        runs=args.runs,
        parser=args.parser,
        settings=_settings(args),
    )


def _report(args: argparse.Namespace) -> None:
    from silkie_jax.evaluation.report.page import write_report

    if args.examples < 0:
        raise UserError(f"--examples must not be negative, not {args.examples}")
    print(f"report: {write_report(args.runs, Path(args.out), args.examples)}")
