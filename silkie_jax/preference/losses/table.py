"""Losses by name, and what a configuration says about them.

    loss: sigmoid
    loss: {name: vdpo, gamma: 0.75, guide: policy}
    loss: [{name: sigmoid, weight: 0.8}, {name: bco_pair, weight: 0.2}, {name: sft, weight: 1.0}]      a weighted sum

Options and their types are those of the function's signature.
"""

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxtyping import Array, Float

from silkie_jax.errors import UserError
from silkie_jax.preference.losses import pairwise
from silkie_jax.preference.losses.memory import RunningMean
from silkie_jax.preference.losses.needs import Needs, Pass
from silkie_jax.preference.losses.pairs import Pairs
from silkie_jax.preference.losses.spa import spa, spa_margins, spa_needs, spa_report
from silkie_jax.preference.losses.vdpo import vdpo, vdpo_mend, vdpo_needs, vdpo_report

OfPairs = Callable[..., Float[Array, "P"]]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss and what it needs; every function here takes the loss's options by name.

    Attributes:
      function: of `Pairs` and options to the loss of each pair.
      needs: what of `Pairs` it reads, of the options.
      records: of each pair, what its memory takes up.
      report: of each pair, what is reported beside the loss; means over the pairs are.
      mend: of the options, one line on what is wrong with them together; None: nothing.
    """

    function: OfPairs
    needs: Callable[..., Needs] = lambda **options: Needs()
    records: OfPairs | None = None
    report: Callable[..., dict[str, Float[Array, "P"]]] = lambda pairs, **options: {}
    mend: Callable[..., str | None] = lambda **options: None


LOSSES: dict[str, Loss] = {
    f.__name__: Loss(f)
    for f in (
        pairwise.sigmoid,
        pairwise.sigmoid_norm,
        pairwise.ipo,
        pairwise.hinge,
        pairwise.robust,
        pairwise.exo_pair,
        pairwise.discopop,
        pairwise.apo_zero,
        pairwise.apo_down,
        pairwise.sppo_hard,
        pairwise.nca_pair,
    )
} | {
    "bco_pair": Loss(
        pairwise.bco_pair,
        needs=lambda shift, **options: Needs(memory=RunningMean() if shift else None),
        records=pairwise.bco_rewards,
    ),
    "sft": Loss(pairwise.sft, report=lambda pairs, **options: {"sft_loss": pairwise.sft(pairs)}),
    "vdpo": Loss(vdpo, vdpo_needs, report=vdpo_report, mend=vdpo_mend),
    "spa": Loss(spa, spa_needs, spa_margins, spa_report),
}


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """The configuration's keys beside `loss`: they hold for a loss that names no such option of its own.

    Attributes:
        beta: strength of the pull to the reference; rewards are reported with it.
        label_smoothing: assumed share of flipped preferences; 0: the loss's own.
        sft_weight: of the likelihood of the chosen response, beside any of the losses (`sft`).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class Term:
    """One loss of a weighted sum, with all of its options."""

    name: str
    weight: float
    options: Mapping[str, Any]

    @property
    def loss(self) -> Loss:
        return LOSSES[self.name]

    @property
    def needs(self) -> Needs:
        return self.loss.needs(**self.options)

    def __call__(self, pairs: Pairs) -> Float[Array, "P"]:
        return self.loss.function(pairs, **self.options)

    def __str__(self) -> str:
        known = inspect.signature(self.loss.function).parameters
        own = (f"{key} {value}" for key, value in self.options.items() if key == "beta" or value != known[key].default)
        return ", ".join((f"{self.weight:g} x {self.name}" if self.weight != 1 else self.name, *own))


def passes_of(terms: Iterable[Term]) -> list[Pass]:
    """What the losses need beside policy and reference with their own images, each once."""
    return sorted(frozenset().union(*(term.needs.passes for term in terms)), key=str)


def read_loss(given: Any, options: LossOptions | None = None) -> tuple[Term, ...]:
    """The terms of what stands at `loss`: a name, a mapping with `name` and options, or a list of those.

    Raises:
      UserError: one line that names the key and the mend.
    """
    common = options or LossOptions()
    _need(0 < common.beta < math.inf, "beta must be positive", common.beta)
    _need(0 <= common.label_smoothing < 0.5, "label_smoothing must be in [0, 0.5)", common.label_smoothing)
    _need(0 <= common.sft_weight < math.inf, "sft_weight must be at least 0 and finite", common.sft_weight)
    several = isinstance(given, list | tuple)
    if several and not given:
        raise UserError("loss: the list is empty; name a loss")
    terms = [_read_term(one, common, several) for one in (given if several else [given])]
    if common.sft_weight:
        terms.append(Term("sft", common.sft_weight, {}))
    names = [term.name for term in terms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        also = " (sft_weight is one)" if twice == "sft" and common.sft_weight else ""
        raise UserError(f"loss: {twice!r} is there twice{also}; keep one, with the sum of both weights")
    if set(names) == {"sft"}:
        raise UserError("loss: 'sft' alone compares nothing; use objective: sft, or add another loss to the list")
    return tuple(terms)


def _read_term(given: Any, common: LossOptions, weighted: bool) -> Term:
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise UserError("loss must be a name, {name: ..., options} or a list of those, each with a weight")
    own = dict(given)
    name, weight = own.pop("name"), own.pop("weight", 1.0) if weighted else 1.0
    if name not in LOSSES:
        raise UserError(f"loss: {name!r} is unknown; choose one of {', '.join(LOSSES)}")
    _need(_is_number(weight) and 0 < weight < math.inf, f"loss {name}: weight must be positive", weight)
    parameters = inspect.signature(LOSSES[name].function).parameters
    known = {key: one for key, one in parameters.items() if one.kind is inspect.Parameter.KEYWORD_ONLY}
    values = {key: one.default for key, one in known.items()}
    if "beta" in known:
        values["beta"] = common.beta
    if common.label_smoothing and "label_smoothing" in known:
        values["label_smoothing"] = common.label_smoothing
    elif common.label_smoothing:
        able = [other for other in LOSSES if "label_smoothing" in inspect.signature(LOSSES[other].function).parameters]
        raise UserError(f"label_smoothing has no meaning in loss {name!r}; set it to 0 or use {' or '.join(able)}")
    for key, value in own.items():
        if key not in known:
            there = ", ".join(known) or "none"
            hint = "; a weight is for the losses of a list" if key == "weight" else ""
            raise UserError(f"loss {name}: unknown option {key!r}; it has {there}{hint}")
        values[key] = _read_option(name, key, value, known[key].annotation)
    _check_ranges(name, values)
    mend = LOSSES[name].mend(**values)
    if mend:
        raise UserError(f"loss {name}: {mend}")
    return Term(name, float(weight), values)


def _read_option(name: str, key: str, value: Any, kind: Any) -> Any:
    choices = typing.get_args(kind)
    if choices:
        if value not in choices:
            raise UserError(f"loss {name}: {key}: {value!r} is unknown; choose one of {', '.join(choices)}")
        return value
    fits = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: _is_number(value),
    }[kind]
    _need(fits, f"loss {name}: {key} must be {_WORDS[kind]}", repr(value))
    return kind(value)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": (lambda x: 0 < x < math.inf, "positive"),
    "label_smoothing": (lambda x: 0 <= x < 0.5, "in [0, 0.5)"),
    "divergence_alpha": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "temperature": (lambda x: 0 < x < math.inf, "positive"),
    "gamma": (lambda x: 0 <= x < math.inf, "at least 0 and finite"),
    "draws": (lambda x: x >= 1, "at least 1"),
    "alpha": (lambda x: 0 <= x < 0.5, "in [0, 0.5)"),
    "percentile": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "window": (lambda x: x >= 2, "at least 2"),
    "begin": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "extrapolation": (lambda x: 0 <= x < math.inf, "at least 0 and finite"),
}


def _check_ranges(name: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key in _RANGES:
            holds, words = _RANGES[key]
            _need(holds(value), f"loss {name}: {key} must be {words}", value)
    if name == "exo_pair":
        _need(values["label_smoothing"] > 0, "loss exo_pair: label_smoothing must be above 0", 0)


def _need(ok: bool, message: str, value: Any) -> None:
    if not ok:
        raise UserError(f"{message}, not {value}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
