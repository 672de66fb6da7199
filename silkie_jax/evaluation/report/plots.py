"""The pictures of a report: bars of sub-tasks, and a radar over all benchmarks; drawn by matplotlib."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np

from silkie_jax.errors import UserError

try:
    import matplotlib
except ImportError:
    raise UserError("plots need matplotlib: pip install 'silkie-jax[evaluation]'") from None

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.projections.polar import PolarAxes

COLOURS = ("#60676e", "#3b7ea1", "#c98f3a", "#2f7d5b", "#8a4b7a", "#b2432f")
Interval = tuple[float, float, float]
"""Value, low, high."""


def bars(title: str, parts: Sequence[str], values: Mapping[str, Mapping[str, Interval]]) -> bytes:
    """PNG: a group of bars for each part, one for each checkpoint, with its interval."""
    height = 0.9 + 0.26 * len(parts) * max(len(values), 1)
    figure, axes = plt.subplots(figsize=(7.2, max(height, 1.8)))
    thick = 0.8 / max(len(values), 1)
    for k, (name, of) in enumerate(values.items()):
        places = np.arange(len(parts)) + (k - (len(values) - 1) / 2) * thick
        found = np.array([of.get(part, (math.nan,) * 3) for part in parts], float).reshape(-1, 3)
        errors = np.abs(np.nan_to_num(found[:, 1:].T - found[:, 0]))
        axes.barh(
            places, found[:, 0], thick, xerr=errors, label=name, color=COLOURS[k % len(COLOURS)], ecolor="#9aa4ab"
        )
    axes.set_yticks(np.arange(len(parts)), [part.replace("_", " ") for part in parts])
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(values) > 1:
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return _png(figure)


def radar(spokes: Sequence[str], values: Mapping[str, Sequence[float]]) -> bytes:
    """PNG: shares of the best possible, in [0, 1], one spoke a figure and one line a checkpoint."""
    figure, axes = plt.subplots(figsize=(6.4, 5.6), subplot_kw={"projection": "polar"})
    assert isinstance(axes, PolarAxes)
    angles = np.linspace(0, 2 * np.pi, len(spokes), endpoint=False)
    for k, (name, of) in enumerate(values.items()):
        closed = [*of, of[0]]
        axes.plot([*angles, angles[0]], closed, color=COLOURS[k % len(COLOURS)], label=name, linewidth=1.8)
        axes.fill([*angles, angles[0]], closed, color=COLOURS[k % len(COLOURS)], alpha=0.08)
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, spokes, fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1], ["25 %", "50 %", "75 %", ""], fontsize=7, color="#60676e")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
    return _png(figure)


def _png(figure: "plt.Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()
