"""How sure a figure is: bootstrap by image, and paired tests of two checkpoints on the same questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from silkie_jax.evaluation.rules.sums import Sums

DRAWS = 1000
LEVEL = 0.95
_AT_ONCE = 2**22  # numbers of one block of draws


def intervals(sums: Sums, draws: int = DRAWS, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Percentile intervals (Efron 1979) of every figure at 95 %: images are drawn with replacement.

    Questions about one image are not independent, so images are drawn and not questions. Draws in which a figure is
    undefined are left out of it.
    """
    found: dict[str, list[np.ndarray]] = {}
    for weights in _weights(len(sums.images), draws, seed):
        for name, values in sums.figures(weights).items():
            found.setdefault(name, []).append(np.asarray(values, np.float64))
    edge = 100 * (1 - LEVEL) / 2
    return {name: _percentiles(np.concatenate(values), edge) for name, values in found.items()}


def _percentiles(values: Float[np.ndarray, "D"], edge: float) -> tuple[float, float]:
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan"), float("nan")
    low, high = np.percentile(values, (edge, 100 - edge))
    return float(low), float(high)


def _weights(images: int, draws: int, seed: int):
    """How often each image is drawn, float64 [some draws, images]."""
    rng = np.random.default_rng(seed)
    at_once = max(_AT_ONCE // max(images, 1), 1)
    for first in range(0, draws if images else 0, at_once):
        count = min(at_once, draws - first)
        drawn = rng.integers(0, images, (count, images)) + images * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images).astype(np.float64)


@dataclass(frozen=True)
class Change:
    """A figure of a second checkpoint minus that of a first, and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def changes(first: Sums, second: Sums, draws: int = DRAWS, seed: int = 0) -> dict[str, Change]:
    """What came of every figure that both have, on the images that both have, by paired bootstrap: each draw takes the
    same images for both, so that what makes an image hard for either cancels."""
    place = {image: n for n, image in enumerate(second.images)}
    shared = [n for n, image in enumerate(first.images) if image in place]
    a = replace(first, images=tuple(first.images[n] for n in shared), counts=first.counts[shared])
    order = [place[image] for image in a.images]
    b = replace(second, images=a.images, counts=second.counts[order])
    before, after = a.figures(), b.figures()
    names = [name for name in before if name in after]
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for weights in _weights(len(shared), draws, seed):
        one, other = a.figures(weights), b.figures(weights)
        for name in names:
            found[name].append(np.asarray(other[name] - one[name], np.float64))
    edge = 100 * (1 - LEVEL) / 2
    return {
        name: Change(float(after[name] - before[name]), *_percentiles(np.concatenate(values), edge))
        for name, values in found.items()
        if values
    }


@dataclass(frozen=True)
class Difference:
    """Two checkpoints on the questions that both answered.

    Attributes:
        items: how many.
        mean: of second minus first.
        low, high: 95 % interval of the mean, by paired bootstrap over images.
        p: of no difference: McNemar's exact test where outcomes are right or wrong, otherwise the bootstrap's.
        test: its name.
        better, worse: items on which the second is better, or worse.
    """

    items: int
    mean: float
    low: float
    high: float
    p: float
    test: str
    better: int
    worse: int

    @property
    def sentence(self) -> str:
        """What it comes to, for people."""
        changed = f"{self.better} of {self.items} better, {self.worse} worse"
        if not self.items:
            return "no question was answered by both"
        if self.p >= 1 - LEVEL:
            return f"{changed}: the difference is within noise ({self.test}, p = {self.p:.2g})"
        word = "better" if self.mean > 0 else "worse"
        return f"{changed}: the second is {word}, beyond noise ({self.test}, p = {self.p:.2g})"


def compare(
    first: Mapping[str, float], second: Mapping[str, float], clusters: Mapping[str, str], seed: int = 0
) -> Difference:
    """Outcomes of two checkpoints, by item, and the image of each item.

    McNemar (1947) in its exact form: of the questions on which exactly one is right, is either's share a half?
    """
    shared = [item for item in first if item in second]
    gains = np.array([second[item] - first[item] for item in shared], np.float64)
    if not shared:
        return Difference(0, float("nan"), float("nan"), float("nan"), float("nan"), "none", 0, 0)
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    draws = _mean_draws(gains, [clusters.get(item, item) for item in shared], seed)
    low, high = _percentiles(draws, 100 * (1 - LEVEL) / 2)
    binary = all(values[item] in (0, 1) for values in (first, second) for item in shared)
    if binary:
        from scipy.stats import binomtest

        p, test = (float(binomtest(better, better + worse).pvalue) if better + worse else 1.0), "McNemar"
    else:
        # Two-sided: how much of the bootstrap lies beyond 0, ties to both sides.
        beyond = min(((draws <= 0).mean(), (draws >= 0).mean()))
        p, test = min(float(2 * (beyond * len(draws) + 1) / (len(draws) + 1)), 1.0), "paired bootstrap"
    return Difference(len(shared), float(gains.mean()), low, high, p, test, better, worse)


def _mean_draws(gains: Float[np.ndarray, "N"], clusters: Sequence[str], seed: int) -> Float[np.ndarray, "D"]:
    _, image = np.unique(np.array(clusters), return_inverse=True)
    sums = np.bincount(image, gains)
    counts = np.bincount(image).astype(np.float64)
    return np.concatenate([(w @ sums) / (w @ counts) for w in _weights(len(counts), DRAWS, seed)])
