"""Preference losses over pairs of responses, by name (table.py); each says what it needs."""

from silkie_jax.preference.losses.needs import POLICY, REFERENCE, Mix, Needs, Pass
from silkie_jax.preference.losses.pairs import Pairs, make_pairs
from silkie_jax.preference.losses.table import LOSSES, Loss, LossOptions, Term, passes_of, read_loss

__all__ = [
    "LOSSES",
    "POLICY",
    "REFERENCE",
    "Loss",
    "LossOptions",
    "Mix",
    "Needs",
    "Pairs",
    "Pass",
    "Term",
    "make_pairs",
    "passes_of",
    "read_loss",
]
