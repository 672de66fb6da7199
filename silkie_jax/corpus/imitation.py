"""Which responses of an instruction supervised fine-tuning imitates.

    all      every response
    chosen   those that win a pair under the pair rule, and lose none
    best     the one with the highest score, of equals the first

A configuration says `imitate: best` or, with options,
`imitate: {name: best, weights: {Helpfulness: 1, Correctness: 1}, at_least: 7}`: rejection sampling is imitating the
best of several answers where it is good enough (arXiv 2402.10884).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from silkie_jax.corpus.pairs import Pairs, best_response
from silkie_jax.corpus.schema import Record
from silkie_jax.corpus.scores import check_weights, is_number
from silkie_jax.errors import UserError

IMITATE = ("all", "chosen", "best")
Imitate = str | Mapping[str, Any]


def imitated(record: Record, choice: Imitate, found: Pairs) -> list[int]:
    """The responses to imitate, by their index, in order.

    Args:
        record: an instruction.
        choice: checked by `check_imitate`.
        found: the record's pairs, of which `chosen` alone makes use.
    """
    match imitate_name(choice):
        case "all":
            return list(range(len(record.responses)))
        case "best":
            best = best_response(record, **_options(choice))
            return [] if best is None else [best]
        case _:
            return sorted({winner for winner, _ in found} - {loser for _, loser in found})


def imitate_name(choice: Imitate) -> str:
    """The name of a choice."""
    return choice if isinstance(choice, str) else str(choice.get("name", ""))


def plain_imitate(choice: Imitate) -> Imitate:
    """The name alone where a choice has no options, so that one choice has one form."""
    return choice if isinstance(choice, str) or _options(choice) else imitate_name(choice)


def check_imitate(choice: Imitate, aspects: Sequence[str] | None = None) -> None:
    """Refuses a choice that means nothing and, given a corpus's aspects, one that the corpus cannot serve.

    Raises:
        UserError: one line that names the key and the mend.
    """
    name = imitate_name(choice) if isinstance(choice, str | Mapping) else choice
    if name not in IMITATE:
        raise UserError(f"imitate: {name!r} is unknown; choose one of {', '.join(IMITATE)}")
    options, where = _options(choice), f"imitate {name}"
    known = ("weights", "at_least") if name == "best" else ()
    for key in options:
        if key not in known:
            raise UserError(f"{where}: unknown option {key!r}; its options: {', '.join(known) or 'none'}")
    if "weights" in options:
        check_weights(where, options["weights"])
    if "at_least" in options and not is_number(options["at_least"]):
        raise UserError(f"{where}: at_least must be a number, not {options['at_least']!r}")
    if aspects is None or name != "best":
        return
    if not aspects:
        raise UserError("imitate best: this corpus has no ratings; use imitate: all or chosen")
    for aspect in options.get("weights", ()):
        if aspect not in aspects:
            raise UserError(f"{where}: this corpus has no aspect {aspect!r}; it has {', '.join(aspects)}")


def _options(choice: Imitate) -> dict[str, Any]:
    return {} if isinstance(choice, str) else {str(key): value for key, value in choice.items() if key != "name"}
