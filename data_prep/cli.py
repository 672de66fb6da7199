"""The verbs of `silkie corpus` that build a corpus: parsing and calling, nothing else."""

import argparse
from pathlib import Path

from silkie_jax.arguments import Add
from silkie_jax.errors import UserError


def add_verbs(add: Add) -> None:
    """Adds all verbs."""
    p = add(
        "instructions",
        _instructions,
        "Gather the instructions of a new run from data sets or images.",
        "silkie corpus instructions configs/sources/vlfeedback.yaml runs/mine",
    )
    p.add_argument("sources", nargs="+", metavar="SRC", help="a YAML file of sources; or data: rows, or images alone")
    p.add_argument("run_dir", metavar="RUN", help="the run to make")
    p.add_argument("--images", metavar="PATH", help="the rows' images: a folder, zip or tar; default: beside the rows")
    p.add_argument("--prompt", action="append", metavar="TEXT", help="what to ask of images alone; may be repeated")
    p.add_argument("--turns", choices=("first", "last", "each"), help="of conversations, which question is asked")
    p.add_argument("--licence", metavar="NAME", help="of the sources, carried through to the corpus")
    p.add_argument("--quota", type=int, metavar="N", help="instructions to draw from each source")
    p.add_argument("--sample", type=int, metavar="N", help="instructions to draw of all")
    p.add_argument("--seed", type=int, help="of the draws")
    p.add_argument("--keep-duplicates", action="store_true", help="list them, but keep them")

    p = add(
        "take",
        _take,
        "Make a run of some of another's instructions; parts of one seed do not overlap.",
        "silkie corpus take runs/prompts runs/part --count 8000 --skip 2000",
    )
    p.add_argument("src", metavar="RUN", help="the run that has them")
    p.add_argument("dst", metavar="DST", help="the run to make")
    p.add_argument("--count", type=int, metavar="N", help="how many; default: all that are left")
    p.add_argument("--skip", type=int, default=0, metavar="N", help="how many come before, in the seed's order")
    p.add_argument("--seed", type=int, default=0, help="of the order")

    p = add(
        "respond",
        _respond,
        "Let several models of a pool answer every instruction of a run.",
        "silkie corpus respond runs/mine --pool configs/pools/vlfeedback.yaml --dry-run",
    )
    p.add_argument("run_dir", metavar="RUN", help="the run, made by `silkie corpus instructions`")
    p.add_argument("--pool", required=True, metavar="FILE.yaml", help="models, endpoints, limits and prices")
    _add_options(p)

    p = add(
        "rate",
        _rate,
        "Let judges rate the responses of a run.",
        "silkie corpus rate runs/mine --judge configs/judges/gpt4v.yaml --budget 200USD",
    )
    p.add_argument("run_dir", metavar="RUN")
    p.add_argument("--judge", required=True, action="append", metavar="FILE.yaml", help="may be given several times")
    p.add_argument("--allow-missing", action="store_true", help="rate also where some responses are still to come")
    _add_options(p)

    p = add(
        "synthesize",
        _synthesize,
        "Let a teacher write descriptions, questions and answers for the images of a run.",
        "silkie corpus synthesize runs/allava --teacher configs/teachers/allava.yaml --budget 50USD",
    )
    p.add_argument("run_dir", metavar="RUN", help="the run, made by `silkie corpus instructions`")
    p.add_argument("--teacher", required=True, metavar="FILE.yaml", help="a model, its endpoint, and how it is asked")
    _add_options(p)

    p = add(
        "build",
        _build,
        "Turn a run's responses and ratings into a corpus; costs nothing.",
        "silkie corpus build runs/mine corpora/mine",
    )
    p.add_argument("run_dir", metavar="RUN")
    p.add_argument("dst", metavar="DST", help="the corpus folder to make, or to complete")
    p.add_argument("--name", default="corpus", help="of the data set, in file names")
    p.add_argument("--judge", action="append", metavar="NAME", help="whose ratings count; default: all judges'")
    p.add_argument("--partial", action="store_true", help="build what there is of an unfinished run")
    p.add_argument("--evaluation", metavar="DST2", help="a second corpus, of instructions that are held out of DST")
    p.add_argument("--evaluation-fraction", type=float, default=0.005, metavar="F", help="how much to hold out")
    p.add_argument("--seed", type=int, default=0, help="of what is held out")
    p.add_argument("--shards", type=int, metavar="N", help="files; default: one for 1,000 instructions")
    p.add_argument(
        "--workers", type=int, metavar="N", help="processes; default: one for 2,000 instructions, up to one a processor"
    )
    p.add_argument("--runner", choices=("processes", "beam"), default="processes")
    p.add_argument("--beam-option", action="append", default=[], metavar="--KEY=VALUE", help="for Apache Beam")

    p = add(
        "report",
        _report,
        "Numbers, pictures and examples of a corpus: one HTML page, and JSON.",
        "silkie corpus report corpora/mine --run runs/mine",
    )
    p.add_argument("corpus", metavar="CORPUS")
    p.add_argument("--out", metavar="FILE.html", help="default: report.html in the corpus; a .json lies beside it")
    p.add_argument("--run", dest="run_dir", metavar="RUN", help="the run it came from: adds what was spent in vain")
    p.add_argument("--examples", type=int, default=12, metavar="N", help="instructions to show")
    p.add_argument("--seed", type=int, default=0, help="of the choice of examples")

    p = add(
        "show",
        _show,
        "Print one instruction with its responses and ratings.",
        "silkie corpus show corpora/mine --number 0",
    )
    p.add_argument("corpus", metavar="CORPUS")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--id", help="of the record")
    which.add_argument("--number", type=int, metavar="N", help="of the record, from 0")
    p.add_argument("--images", metavar="DIR", help="also write its images there")
    p.add_argument("--json", action="store_true", help="print the record as JSON")

    p = add(
        "export-pairs",
        _export_pairs,
        "Write pairs in the forms of trl or LLaMA-Factory.",
        "silkie corpus export-pairs corpora/mine pairs --form trl",
    )
    p.add_argument("corpus", metavar="CORPUS")
    p.add_argument("dst", metavar="DST", help="a folder to make")
    p.add_argument("--form", choices=("trl", "llama-factory"), default="trl")
    p.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", dest="file_format")
    p.add_argument(
        "--pair-rule",
        metavar="RULE",
        help="as in a training config: a name, or YAML such as '{name: aspect, aspect: Helpfulness}'; "
        "default: mean_rating, or the given pairs of a corpus that has no ratings",
    )


def _add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--budget", metavar="USD", help="stop before the whole run, earlier stages included, costs more: 200USD"
    )
    p.add_argument("--batch", action="store_true", help="use the Batch API: half the price, within 24 hours")
    p.add_argument("--poll", type=float, default=30.0, metavar="SECONDS", help="between looks at a batch")
    p.add_argument("--dry-run", action="store_true", help="show requests, tokens and cost, and send nothing")


def _instructions(args: argparse.Namespace) -> None:
    from data_prep.instructions.config import from_arguments
    from data_prep.instructions.gather import gather_instructions

    config = from_arguments(
        args.sources,
        images=args.images,
        prompts=args.prompt,
        turns=args.turns,
        licence=args.licence,
        quota=args.quota,
        sample=args.sample,
        seed=args.seed,
        keep_duplicates=args.keep_duplicates,
    )
    print(gather_instructions(config, args.run_dir).table())


def _take(args: argparse.Namespace) -> None:
    from data_prep.instructions.take import take

    print(f"{take(args.src, args.dst, count=args.count, skip=args.skip, seed=args.seed):,} instructions in the run")


def _respond(args: argparse.Namespace) -> None:
    from data_prep.respond import respond

    print(respond(args.run_dir, args.pool, _options(args)).table())


def _rate(args: argparse.Namespace) -> None:
    from data_prep.judging.rate import rate

    print(rate(args.run_dir, args.judge, _options(args), allow_missing=args.allow_missing).table())


def _synthesize(args: argparse.Namespace) -> None:
    from data_prep.synthesize import synthesize

    print(synthesize(args.run_dir, args.teacher, _options(args)).table())


def _options(args: argparse.Namespace):
    from silkie_jax.endpoints.budget import parse_usd
    from silkie_jax.endpoints.stage import Options

    if args.poll <= 0:
        raise UserError(f"--poll: {args.poll:g} is not a positive number of seconds")
    budget = parse_usd(args.budget) if args.budget is not None else None
    return Options(budget, args.batch, args.dry_run, args.poll)


def _build(args: argparse.Namespace) -> None:
    from data_prep.corpora.build import build

    summary = build(
        args.run_dir,
        args.dst,
        name=args.name,
        judges=args.judge,
        partial=args.partial,
        evaluation=args.evaluation,
        evaluation_fraction=args.evaluation_fraction,
        seed=args.seed,
        shards=args.shards,
        workers=args.workers,
        runner=args.runner,
        beam_options=args.beam_option,
    )
    print(summary.table())


def _report(args: argparse.Namespace) -> None:
    from data_prep.corpora.report import write_report

    html = write_report(args.corpus, args.out, run=args.run_dir, examples=args.examples, seed=args.seed)
    print(f"written to {html} and {html.with_suffix('.json')}")


def _show(args: argparse.Namespace) -> None:
    from data_prep.corpora.show import show

    print(show(args.corpus, id=args.id, number=args.number, images=args.images, as_json=args.json))


def _export_pairs(args: argparse.Namespace) -> None:
    from data_prep.corpora.export import export_pairs

    count = export_pairs(args.corpus, Path(args.dst), form=args.form, file_format=args.file_format, rule=args.pair_rule)
    print(f"{count:,} pairs written to {args.dst}")
