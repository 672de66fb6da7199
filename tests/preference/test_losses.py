"""Losses against their formulas in float64, against what must hold whatever the formula, and against trl's code."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from silkie_jax.errors import UserError
from silkie_jax.preference.losses import LOSSES, LossOptions, Pairs, read_loss
from silkie_jax.preference.losses.memory import RunningMean, Window
from silkie_jax.preference.losses.pairs import Sides
from tests.reference.objective import log_sigmoid, pair_losses

SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "vdpo")
OF_TWO_RATIOS = [name for name in LOSSES if name not in ("vdpo", "spa", "sft")]
_SIDES = ("chosen", "rejected")


def random_pairs(count=32, seed=0, scale=200):
    rng = np.random.default_rng(seed)
    logps = -scale * rng.random((8, count)).astype(np.float32)
    tokens = rng.integers(1, 100, (2, count)).astype(np.float32)
    extra = {"null": Sides(*map(jnp.asarray, logps[4:6])), "mixed": Sides(*map(jnp.asarray, logps[6:]))}
    return Pairs(*map(jnp.asarray, (*logps[:4], *tokens)), **extra, threshold=jnp.float32(0.3), progress=jnp.float32(1))


def one_pair(margin, tokens=(1.0, 1.0)):
    values = [0.0, -margin, 0.0, 0.0, *tokens]
    pairs = Pairs(*(jnp.asarray([v], jnp.float32) for v in values), threshold=jnp.float32(0), progress=jnp.float32(1))
    return pairs._replace(null=Sides(pairs.policy_chosen, pairs.policy_rejected), mixed=None)


def function(name, **options):
    return lambda pairs: LOSSES[name].function(pairs, **options)


def sigmoid(x):
    return np.exp(log_sigmoid(x))


def score(log_ratio, divergence, alpha):
    """f'(u) of arXiv 2309.16240, u the ratio."""
    u = np.exp(log_ratio)
    return {
        "reverse_kl": log_ratio,
        "forward_kl": 1 - 1 / u,
        "js": np.log(2 * u / (1 + u)),
        "alpha": (1 - u**-alpha) / alpha,
    }[divergence]


# Of the chosen and the rejected log-ratio, w and l, and beta b, as the papers have them.
FORMULAS = {
    "exo_pair": lambda w, l, b: _exo(b * (w - l), 1e-3),
    "discopop": lambda w, l, b: _discopop(b * (w - l), 0.05),
    "apo_zero": lambda w, l, b: -sigmoid(b * w) + sigmoid(b * l) + 1,
    "apo_down": lambda w, l, b: sigmoid(b * w) - sigmoid(b * (w - l)) + 1,
    "sppo_hard": lambda w, l, b: (w - 1 / (2 * b)) ** 2 + (l + 1 / (2 * b)) ** 2,
    "nca_pair": lambda w, l, b: -log_sigmoid(b * w) - (log_sigmoid(-b * w) + log_sigmoid(-b * l)) / 2,
    "bco_pair": lambda w, l, b: -log_sigmoid(b * w - 0.3) - log_sigmoid(-(b * l - 0.3)),
}


def _exo(x, e):
    p = sigmoid(x)  # the policy's preference; its KL from (1 - e, e)
    return p * (log_sigmoid(x) - np.log(1 - e)) + (1 - p) * (log_sigmoid(-x) - np.log(e))


def _discopop(x, temperature):
    share = sigmoid(x / temperature)
    return (1 - share) * -log_sigmoid(x) + share * np.exp(-x)


def ratios(pairs):
    return (np.asarray(x, np.float64) for x in (pairs.chosen_log_ratio, pairs.rejected_log_ratio))


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust"])
def test_loss_equals_the_oracles(name, beta):
    for smoothing in (0.0, 0.15) if name in SMOOTHED else (0.0,):
        pairs = random_pairs()
        ours = function(name, beta=beta, **({"label_smoothing": smoothing} if smoothing else {}))(pairs)
        *logps, chosen_tokens, rejected_tokens = (np.asarray(x, np.float64) for x in pairs[:6])
        counts = {"chosen_tokens": chosen_tokens, "rejected_tokens": rejected_tokens}
        expected, *_ = pair_losses(name, *logps, beta=beta, label_smoothing=smoothing, **counts)
        assert ours.shape == (32,)
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_loss_equals_its_formula(name):
    for beta, scale in ((0.05, 200), (0.5, 5)):
        pairs = random_pairs(scale=scale)
        expected = FORMULAS[name](*ratios(pairs), beta)
        ours = function(name, beta=beta)(pairs)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5)
    assert set(FORMULAS) | {"sigmoid", "sigmoid_norm", "ipo", "hinge", "robust"} == set(OF_TWO_RATIOS)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergences_change_what_is_compared(divergence):
    pairs = random_pairs(scale=3)
    chosen, rejected = (score(x, divergence, 0.3) for x in ratios(pairs))
    options = {"beta": 0.7, "divergence": divergence, "divergence_alpha": 0.3}
    for name, formula in {
        "sigmoid": lambda x: -log_sigmoid(x),
        "hinge": lambda x: np.maximum(0, 1 - x),
        "discopop": lambda x: _discopop(x, 0.05),
        "exo_pair": lambda x: _exo(x, 1e-3),
        "robust": lambda x: -log_sigmoid(x),
    }.items():
        expected = formula(0.7 * (chosen - rejected))
        np.testing.assert_allclose(function(name, **options)(pairs), expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", [n for n in OF_TWO_RATIOS if n not in ("discopop", "apo_down")] + ["vdpo", "spa"])
def test_loss_pulls_the_chosen_up_and_the_rejected_down(name):
    """At the start, where policy and reference agree. (DiscoPOP rises around 0, APO-down lowers both.)"""
    pairs = random_pairs()
    pairs = pairs._replace(**{f"policy_{k}": getattr(pairs, f"reference_{k}") for k in _SIDES})
    pairs = pairs._replace(threshold=jnp.float32(0), mixed=None)
    slope = jax.grad(lambda p: function(name, beta=0.1)(p).sum())(pairs)
    assert (slope.policy_chosen < 0).all()
    assert (slope.policy_rejected > 0).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_and_slope_stay_finite_far_from_the_reference(name):
    given = {"label_smoothing": 0.3} if name in SMOOTHED else {}
    divergent = ("sigmoid", "hinge", "robust", "exo_pair", "discopop")
    more = [{"divergence": "alpha"}, {"divergence": "js"}] if name in divergent else []
    for margin, options in itertools.product((-1e4, 1e4), [given, *more]):
        value, slope = jax.value_and_grad(lambda p, o=options: function(name, **o)(p).sum())(one_pair(margin))
        assert np.isfinite(value)
        assert all(np.isfinite(s).all() for s in jax.tree.leaves(slope))


def test_length_normalised_loss_sees_means_over_tokens():
    doubled = one_pair(6.0, (4.0, 4.0))
    assert function("sigmoid_norm", beta=0.4)(doubled) == function("sigmoid", beta=0.1)(one_pair(6.0))
    empty = function("sigmoid_norm", beta=0.4)(one_pair(6.0, (0.0, 0.0)))  # padding: masked later, but no NaN
    assert np.isfinite(empty).all()


def test_likelihood_term_is_the_mean_over_the_tokens_of_the_chosen_response_alone():
    pairs, likelihood = random_pairs(), function("sft")
    found, slope = likelihood(pairs), jax.grad(lambda p: likelihood(p).sum())(pairs)
    chosen, tokens = np.asarray(pairs.policy_chosen, np.float64), np.asarray(pairs.chosen_tokens, np.float64)
    np.testing.assert_allclose(found, -chosen / tokens, rtol=1e-6)
    np.testing.assert_allclose(slope.policy_chosen, -1 / tokens, rtol=1e-6)
    assert not slope.policy_rejected.any()
    assert np.isfinite(likelihood(one_pair(6.0, (0.0, 0.0)))).all()  # padding: masked later, but no NaN


# V-DPO and SPA (their official numbers are in tests/related)


@pytest.mark.parametrize("gradient", ["paper", "release"])
@pytest.mark.parametrize("guide", ["policy", "reference"])
def test_a_picture_that_does_not_count_leaves_dpos_value(guide, gradient):
    pairs = random_pairs()
    blind = pairs._replace(null=Sides(pairs.policy_chosen, pairs.policy_rejected))
    for gamma in (0.0, 0.5, 2.0):
        ours = function("vdpo", gamma=gamma, guide=guide, gradient=gradient)(blind)
        np.testing.assert_allclose(ours, function("sigmoid")(pairs), rtol=1e-6)


def test_gradients_of_paper_and_release_differ_by_gamma():
    pairs = random_pairs(scale=20)

    def slope(gradient, gamma):
        loss = function("vdpo", gamma=gamma, gradient=gradient)
        return jax.grad(lambda p: loss(p).sum())(pairs).policy_chosen

    np.testing.assert_allclose(slope("release", 0.4), 0.4 * slope("paper", 0.4), rtol=1e-5)
    assert not slope("release", 0.0).any()
    assert (slope("paper", 0.0) < 0).all()


def test_an_image_pair_that_is_swapped_negates_its_logit():
    pairs = random_pairs(scale=20)
    null = Sides(pairs.null.chosen, pairs.null.chosen)  # one text: without a picture it is the same
    swapped = pairs._replace(
        policy_chosen=pairs.policy_rejected,
        policy_rejected=pairs.policy_chosen,
        reference_chosen=pairs.reference_rejected,
        reference_rejected=pairs.reference_chosen,
        null=null,
    )
    loss = function("vdpo", gamma=0.6)
    difference = np.asarray(loss(swapped) - loss(pairs._replace(null=null)))  # -log s(-z) + log s(z) is z
    f = [
        p + (0.6 - 1) * (p - n) - r
        for p, n, r in (
            (pairs.policy_chosen, null.chosen, pairs.reference_chosen),
            (pairs.policy_rejected, null.rejected, pairs.reference_rejected),
        )
    ]
    np.testing.assert_allclose(difference, 0.1 * (f[0] - f[1]), rtol=1e-4, atol=1e-5)


def test_spa_that_trusts_all_is_dpo_and_that_trusts_none_is_conservative_dpo():
    pairs = random_pairs(scale=20)
    for threshold, smoothing in ((-1e9, 0.0), (1e9, 0.2)):
        ours = function("spa", alpha=0.2)(pairs._replace(threshold=jnp.float32(threshold)))
        np.testing.assert_allclose(ours, function("sigmoid", label_smoothing=smoothing)(pairs), rtol=1e-6)
    early = function("spa", alpha=0.2)(pairs._replace(threshold=jnp.float32(1e9), progress=jnp.float32(0.19)))
    np.testing.assert_allclose(early, function("sigmoid")(pairs), rtol=1e-6)
    np.testing.assert_allclose(function("spa")(one_pair(0.0)), np.log(2), rtol=1e-6)


# What losses remember


def take(memory, kept, values, order=None):
    """A step's pairs, with one in between that is none."""
    order = np.arange(len(values)) if order is None else np.asarray(order)
    values, order = np.append(values, 99.0), np.append(order, -1)
    valid = np.append(np.ones(len(values) - 1, bool), False)
    return memory.take(kept, jnp.asarray(values, jnp.float32), jnp.asarray(order), jnp.asarray(valid))


def test_a_window_keeps_the_latest_in_whatever_batches_they_came():
    values = np.random.default_rng(0).standard_normal(23).astype(np.float32)
    window = Window(8, 0.25)
    for sizes in ([23], [1] * 23, [5, 9, 9], [20, 3]):
        kept, at = window.start(), 0
        for size in sizes:
            some = values[at : at + size]
            shuffled = np.random.default_rng(size).permutation(size)
            kept, at = take(window, kept, some[shuffled], shuffled), at + size
        assert sorted(np.asarray(kept["values"]).tolist()) == sorted(values[-8:].tolist())
        assert float(window.read(kept)) == pytest.approx(np.sort(values[-8:])[2:4].mean())
    assert float(window.read(take(window, window.start(), values[:7]))) == 0


def test_a_running_mean_is_that_of_all_pairs():
    mean, kept, values = RunningMean(), RunningMean().start(), np.random.default_rng(0).standard_normal(10)
    assert float(mean.read(kept)) == 0
    for some in (values[:3], values[3:4], values[4:]):
        kept = take(mean, kept, some)
    assert float(mean.read(kept)) == pytest.approx(values.mean(), rel=1e-5)


# Configuration


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("dpo", {}, "loss: 'dpo' is unknown; choose one of sigmoid"),
        ("sigmoid", {"beta": 0.0}, "beta must be positive, not 0.0"),
        ("sigmoid", {"label_smoothing": 0.5}, "label_smoothing must be in [0, 0.5), not 0.5"),
        ("ipo", {"sft_weight": -1.0}, "sft_weight must be at least 0 and finite, not -1.0"),
        ("ipo", {"sft_weight": float("nan")}, "sft_weight must be at least 0 and finite, not nan"),
        ("ipo", {"label_smoothing": 0.1}, "label_smoothing has no meaning in loss 'ipo'"),
        ({"name": "spa"}, {"label_smoothing": 0.1}, "label_smoothing has no meaning in loss 'spa'"),
        (3, {}, "loss must be a name, {name: ..., options} or a list of those, each with a weight"),
        ({"name": "vdpo", "gama": 1}, {}, "loss vdpo: unknown option 'gama'; it has beta, label_smoothing, gamma"),
        ({"name": "vdpo", "guide": "x"}, {}, "loss vdpo: guide: 'x' is unknown; choose one of policy, reference"),
        ({"name": "vdpo", "draws": 2}, {}, "draws is 2, but null_image mean is always the same"),
        ({"name": "vdpo", "gamma": "much"}, {}, "loss vdpo: gamma must be a number, not 'much'"),
        ({"name": "spa", "window": 1.5}, {}, "loss spa: window must be a whole number, not 1.5"),
        ({"name": "spa", "percentile": 1.0}, {}, "loss spa: percentile must be in [0, 1), not 1.0"),
        ({"name": "exo_pair", "label_smoothing": 0}, {}, "loss exo_pair: label_smoothing must be above 0"),
        ({"name": "sigmoid", "weight": 2}, {}, "unknown option 'weight'"),
        ([], {}, "loss: the list is empty; name a loss"),
        (["ipo", "ipo"], {}, "loss: 'ipo' is there twice; keep one"),
        (["ipo", "sft"], {"sft_weight": 0.1}, "loss: 'sft' is there twice (sft_weight is one)"),
        ([{"name": "ipo", "weight": 0}], {}, "loss ipo: weight must be positive, not 0"),
        ("sft", {}, "loss: 'sft' alone compares nothing; use objective: sft"),
    ],
)
def test_what_has_no_meaning_is_refused(given, options, message):
    with pytest.raises(UserError) as caught:
        read_loss(given, LossOptions(**options))
    assert message in str(caught.value)


def test_keys_beside_the_loss_hold_where_it_names_none_of_its_own():
    given = [{"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2, "beta": 0.5}, "sft"]
    first, second, third = read_loss(given, LossOptions(0.3))
    assert (first.options["beta"], second.options["beta"]) == (0.3, 0.5)
    assert (first.weight, second.weight, third.weight) == (0.8, 0.2, 1.0)
    assert read_loss("ipo", LossOptions(0.1, 0.0, 0.7))[1].weight == 0.7
    assert str(second) == "0.2 x bco_pair, beta 0.5"
    for name in SMOOTHED:
        assert read_loss(name, LossOptions(0.1, 0.2))[0].options["label_smoothing"] == 0.2


# trl's own code


@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        *((name, {}, {}) for name in ("sigmoid", "hinge", "robust", "exo_pair", "nca_pair", "sppo_hard")),
        *((name, {}, {}) for name in ("apo_zero", "apo_down", "discopop")),
        ("sigmoid", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("robust", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ("sigmoid", {"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
        ("sigmoid", {"divergence": "forward_kl"}, {"f_divergence_type": "alpha_divergence"}),  # its alpha is 1
        ("bco_pair", {}, {}),
    ],
)
def test_trl_computes_the_same(name, options, theirs):
    torch = pytest.importorskip("torch")
    trl = pytest.importorskip("trl")
    if not hasattr(trl.DPOTrainer, "dpo_loss"):
        pytest.skip("this trl has its losses inside of a step; up to 0.29 they are a function")
    from trl.trainer.dpo_config import FDivergenceType
    from trl.trainer.utils import RunningMoments

    pairs = random_pairs(scale=10)
    accelerator = SimpleNamespace(device="cpu", use_distributed=False, gather=lambda x: x)
    trainer = SimpleNamespace(
        beta=0.1,
        label_smoothing=theirs.get("label_smoothing", 0.0),
        f_divergence_type=FDivergenceType(theirs.get("f_divergence_type", "reverse_kl")),
        reference_free=False,
        f_divergence_params={},
        accelerator=accelerator,
        running=RunningMoments(accelerator),
        args=SimpleNamespace(discopop_tau=0.05),
    )
    logps = (torch.tensor(np.asarray(x)) for x in pairs[:4])
    expected = trl.DPOTrainer.dpo_loss(trainer, *logps, loss_type=name)[0].numpy()
    if name == "bco_pair":  # its mean holds this very batch
        rewards = LOSSES[name].records(pairs, beta=0.1)
        pairs = pairs._replace(threshold=rewards.mean())
    np.testing.assert_allclose(function(name, beta=0.1, **options)(pairs), expected, rtol=2e-5, atol=1e-5)
