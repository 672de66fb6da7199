"""Losses against their formulas in tests/reference, and against what must hold whatever the formula."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from silkie_jax.errors import UserError
from silkie_jax.preference.losses import LOSSES, LossOptions, Pairs, check_loss, chosen_nll
from tests.reference.objective import pair_losses

SMOOTHED = ("sigmoid", "sigmoid_norm", "robust")


def random_pairs(count=32, seed=0):
    rng = np.random.default_rng(seed)
    logps = -200 * rng.random((4, count)).astype(np.float32)
    tokens = rng.integers(1, 100, (2, count)).astype(np.float32)
    return Pairs(*map(jnp.asarray, (*logps, *tokens)))


def one_pair(margin, tokens=(1.0, 1.0)):
    values = [0.0, -margin, 0.0, 0.0, *tokens]
    return Pairs(*(jnp.asarray([v], jnp.float32) for v in values))


def test_every_loss_is_in_the_table_under_its_name():
    assert sorted(LOSSES) == ["hinge", "ipo", "robust", "sigmoid", "sigmoid_norm"]


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_equals_its_formula(name, beta):
    for smoothing in (0.0, 0.15) if name in SMOOTHED else (0.0,):
        pairs = random_pairs()
        ours = LOSSES[name](pairs, LossOptions(beta, smoothing))
        *logps, chosen_tokens, rejected_tokens = (np.asarray(x, np.float64) for x in pairs)
        counts = {"chosen_tokens": chosen_tokens, "rejected_tokens": rejected_tokens}
        expected, *_ = pair_losses(name, *logps, beta=beta, label_smoothing=smoothing, **counts)
        assert ours.shape == (32,)
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_pulls_the_chosen_up_and_the_rejected_down(name):
    """At the start, where policy and reference agree."""
    pairs = random_pairs()._replace(**{f"policy_{k}": getattr(random_pairs(), f"reference_{k}") for k in _SIDES})
    slope = jax.grad(lambda p: LOSSES[name](p, LossOptions(0.1, 0.1 * (name in SMOOTHED))).sum())(pairs)
    assert (slope.policy_chosen < 0).all()
    assert (slope.policy_rejected > 0).all()


_SIDES = ("chosen", "rejected")


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_and_slope_stay_finite_far_from_the_reference(name):
    for margin, smoothing in itertools.product((-1e4, 1e4), (0.0, 0.3) if name in SMOOTHED else (0.0,)):
        value, slope = jax.value_and_grad(lambda p, e=smoothing: LOSSES[name](p, LossOptions(0.1, e)).sum())(
            one_pair(margin)
        )
        assert np.isfinite(value)
        assert all(np.isfinite(s).all() for s in slope)


def test_length_normalised_loss_sees_means_over_tokens():
    doubled = one_pair(6.0, (4.0, 4.0))
    assert LOSSES["sigmoid_norm"](doubled, LossOptions(0.4)) == LOSSES["sigmoid"](one_pair(6.0), LossOptions(0.1))
    empty = LOSSES["sigmoid_norm"](one_pair(6.0, (0.0, 0.0)), LossOptions(0.4))  # padding: masked later, but no NaN
    assert np.isfinite(empty).all()


def test_likelihood_term_is_the_mean_over_the_tokens_of_the_chosen_response_alone():
    pairs = random_pairs()
    found, slope = chosen_nll(pairs), jax.grad(lambda p: chosen_nll(p).sum())(pairs)
    chosen, tokens = np.asarray(pairs.policy_chosen, np.float64), np.asarray(pairs.chosen_tokens, np.float64)
    np.testing.assert_allclose(found, -chosen / tokens, rtol=1e-6)
    np.testing.assert_allclose(slope.policy_chosen, -1 / tokens, rtol=1e-6)
    assert not slope.policy_rejected.any()
    assert np.isfinite(chosen_nll(one_pair(6.0, (0.0, 0.0)))).all()  # padding: masked later, but no NaN


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo", LossOptions(), "loss: 'dpo' is unknown; choose one of sigmoid"),
        ("sigmoid", LossOptions(beta=0.0), "beta must be positive, not 0.0"),
        ("sigmoid", LossOptions(label_smoothing=0.5), "label_smoothing must be in [0, 0.5), not 0.5"),
        ("ipo", LossOptions(sft_weight=-1.0), "sft_weight must be at least 0 and finite, not -1.0"),
        ("ipo", LossOptions(sft_weight=float("nan")), "sft_weight must be at least 0 and finite, not nan"),
        ("ipo", LossOptions(label_smoothing=0.1), "label_smoothing has no meaning in loss 'ipo'"),
        ("hinge", LossOptions(label_smoothing=0.1), "label_smoothing has no meaning in loss 'hinge'"),
    ],
)
def test_options_without_meaning_are_refused(name, options, message):
    with pytest.raises(UserError) as caught:
        check_loss(name, options)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_sound_options_pass(name):
    check_loss(name, LossOptions(0.1, 0.1 if name in SMOOTHED else 0.0))
