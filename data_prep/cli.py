"""The verbs of `silkie corpus` that build a corpus: parsing and calling, nothing else."""

import argparse
from collections.abc import Callable

from data_prep import verbs
from silkie_jax.errors import UserError

Add = Callable[[str, Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]
"""(name, function, about) -> the parser of a new verb."""


def add_verbs(add: Add) -> None:
    """Adds all verbs."""
    p = add("respond", _respond, "Let several models of a pool answer every instruction of a run.")
    p.add_argument("run_dir", metavar="RUN", help="the run, made by `silkie corpus instructions`")
    p.add_argument("--pool", required=True, metavar="FILE.yaml", help="models, endpoints, limits and prices")
    _add_options(p)
    p = add("rate", _rate, "Let judges rate the responses of a run.")
    p.add_argument("run_dir", metavar="RUN")
    p.add_argument("--judge", required=True, action="append", metavar="FILE.yaml", help="may be given several times")
    p.add_argument("--allow-missing", action="store_true", help="rate also where some responses are still to come")
    _add_options(p)
    verbs.add_verbs(add)


def _add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--budget", metavar="USD", help="stop before the whole run, earlier stages included, costs more: 200USD"
    )
    p.add_argument("--batch", action="store_true", help="use the Batch API: half the price, within 24 hours")
    p.add_argument("--poll", type=float, default=30.0, metavar="SECONDS", help="between looks at a batch")
    p.add_argument("--dry-run", action="store_true", help="show requests, tokens and cost, and send nothing")


def _respond(args: argparse.Namespace) -> None:
    from data_prep.respond import respond

    print(respond(args.run_dir, args.pool, _options(args)).table())


def _rate(args: argparse.Namespace) -> None:
    from data_prep.rate import rate

    print(rate(args.run_dir, args.judge, _options(args), allow_missing=args.allow_missing).table())


def _options(args: argparse.Namespace):
    from data_prep.budget import parse_usd
    from data_prep.stage import Options

    if args.poll <= 0:
        raise UserError(f"--poll: {args.poll:g} is not a positive number of seconds")
    budget = parse_usd(args.budget) if args.budget is not None else None
    return Options(budget, args.batch, args.dry_run, args.poll)
