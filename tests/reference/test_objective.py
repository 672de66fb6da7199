"""Losses, log-probabilities, gradients and AdamW of the oracle: against golden, and against what must hold anyway."""

import functools
import math

import numpy as np
import pytest

from tests.reference.golden import Golden
from tests.reference.objective import (
    IGNORED,
    AdamW,
    branch_row,
    global_norm,
    log_sigmoid,
    log_softmax,
    pair_losses,
    summed_logps,
)
from tests.reference.qwen_vl import QwenVL, load_adapter, load_checkpoint

LOGPS = 5e-4
GRADIENT = 1e-4
BETA = 0.1


@pytest.fixture(scope="module")
def data(golden):
    return Golden(golden)


@pytest.fixture(scope="module")
def base(data):
    return load_checkpoint(data.checkpoint)


class Scorer:
    """Summed log-probabilities of golden's DPO batches under one set of weights."""

    def __init__(self, data, tensors, config, adapter=None, features=None):
        self.data, self.model = data, QwenVL(tensors, config, adapter)
        self.features = self.model.image_features(data.resized) if features is None else features

    def __call__(self, batch, train=True):
        """Those of the chosen rows and those of the rejected ones."""
        tokens, labels, mask = self.data.pairs(batch)
        features = self.features[self.data.image_indices(tokens)]
        final = self.model.hidden_states(tokens, mask=mask, train=train, features=features)[-1]
        # The vocabulary only where something is predicted: slopes need many of these passes.
        row, at = np.nonzero(labels[:, 1:] != IGNORED)
        logps = log_softmax(self.model.linear("lm_head", final[row, at]))[np.arange(len(row)), labels[row, at + 1]]
        return np.split(np.bincount(row, logps, minlength=len(tokens)), 2)


@pytest.fixture(scope="module")
def reference(data, base):
    return Scorer(data, *base)


@pytest.fixture(scope="module")
def policy(data, base):
    return Scorer(data, {**base[0], **data.policy_overrides}, base[1])


@pytest.fixture(scope="module")
def reference_logps(reference):
    return functools.cache(reference)


@pytest.fixture(scope="module")
def policy_logps(policy):
    return functools.cache(policy)


# The DPO batches of the original stack


@pytest.mark.parametrize("modes", [("train", "train"), ("train", "eval"), ("eval", "eval")], ids="-".join)
@pytest.mark.parametrize("batch", ["batch0", "batch1"])
def test_dpo_batch(data, policy_logps, reference_logps, batch, modes):
    logps = [*policy_logps(batch, modes[0] == "train"), *reference_logps(batch, modes[1] == "train")]
    losses, chosen, rejected = pair_losses("sigmoid", *logps, beta=BETA)

    expected = {name: data.dpo[f"{batch}/policy_{modes[0]}__ref_{modes[1]}/{name}"] for name in (
        "policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps",
        "losses", "chosen_rewards", "rejected_rewards", "loss_mean",
    )}  # fmt: skip
    for ours, name in zip(logps, expected, strict=False):
        np.testing.assert_allclose(ours, expected[name], rtol=0, atol=LOGPS, err_msg=name)
    # A pair's loss sees beta times four log-probabilities.
    for ours, name in [(losses, "losses"), (chosen, "chosen_rewards"), (rejected, "rejected_rewards")]:
        np.testing.assert_allclose(ours, expected[name], rtol=0, atol=BETA * LOGPS, err_msg=name)
    assert losses.mean() == pytest.approx(float(expected["loss_mean"]), abs=BETA * LOGPS)


@pytest.mark.parametrize("batch", ["batch0", "batch1"])
def test_dpo_batch_with_adapter(data, base, reference, reference_logps, batch):
    """Adapter on is the policy, adapter off the reference."""
    adapted = Scorer(data, *base, load_adapter(data.adapter), reference.features)
    logps = [*adapted(batch, True), *reference_logps(batch, True)]
    losses, chosen, rejected = pair_losses("sigmoid", *logps, beta=BETA)
    expected = {name.split("/")[1]: x for name, x in data.lora.items() if name.startswith(f"dpo_{batch}/")}
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    for ours, name in zip(logps, names, strict=True):
        np.testing.assert_allclose(ours, expected[name], rtol=0, atol=LOGPS, err_msg=name)
    for ours, name in [(losses, "losses"), (chosen, "chosen_rewards"), (rejected, "rejected_rewards")]:
        np.testing.assert_allclose(ours, expected[name], rtol=0, atol=BETA * LOGPS, err_msg=name)


@pytest.mark.parametrize("response", ["chosen", "rejected"])
def test_truncated_rows(data, policy, response):
    """Also of rows whose image the original collator has cut: no <img> is left, so they are plain text."""
    cases = [name for name, case in data.json("dpo")["truncation"].items() if case.get("forward") == "ok"]
    assert len(cases) == 7
    for case in cases:
        names = ("input_ids", "labels", "attention_mask")
        tokens, labels, mask = (data.dpo[f"trunc/{case}/{response}_{name}"] for name in names)
        features = policy.features[data.image_indices(tokens)] if data.image_indices(tokens) else None
        ours = summed_logps(policy.model(tokens, mask=mask, train=True, features=features), labels)
        expected = data.dpo[f"trunc/{case}/policy_train_{response}_logps"]
        np.testing.assert_allclose(ours, expected, rtol=0, atol=LOGPS, err_msg=case)


# Gradients: the slope of the oracle's loss along a direction against golden's gradient


def slope(loss, parameters, direction, step=1e-6):
    up, down = (
        loss(parameters | {name: parameters[name] + sign * step * d for name, d in direction.items()})
        for sign in (1, -1)
    )
    return (up - down) / (2 * step)


def assert_slope(loss, parameters, gradients, direction):
    ours = slope(loss, parameters, direction)
    golden = sum(float((gradients[name] * d).sum()) for name, d in direction.items())
    # The scale of a projection: chance may make it nearly vanish, which is no reason to ask for more digits.
    norms = [np.linalg.norm(gradients[n]) * np.linalg.norm(d) / math.sqrt(d.size) for n, d in direction.items()]
    assert ours == pytest.approx(golden, abs=GRADIENT * max(abs(golden), np.linalg.norm(norms)))


def random_directions(gradients, seed, count):
    """Each parameter moves by noise in inverse proportion to its gradient, so that all of them weigh alike."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {n: rng.standard_normal(g.shape) / (np.linalg.norm(g) + 1e-12) for n, g in gradients.items()}


@pytest.mark.slow
def test_gradients(data, base, policy, reference_logps):
    """Every gradient of batch 0 that golden keeps, towers included: along itself, and all along random directions."""
    gradients = {n.removeprefix("batch0/grad/"): g.astype(np.float64) for n, g in data.dpo.items() if "/grad/" in n}
    assert len(gradients) == 14

    def loss(tensors):
        same_tower = not any("visual" in name and tensors[name] is not policy.model.tensors[name] for name in gradients)
        scorer = Scorer(data, tensors, base[1], features=policy.features if same_tower else None)
        return pair_losses("sigmoid", *scorer("batch0"), *reference_logps("batch0", True), beta=BETA)[0].mean()

    for name, gradient in gradients.items():
        along = {name: gradient / np.linalg.norm(gradient)}
        assert_slope(loss, policy.model.tensors, gradients, along)
    for direction in random_directions(gradients, seed=0, count=3):
        assert_slope(loss, policy.model.tensors, gradients, direction)


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["batch0", "batch1"])
def test_lora_gradients(data, base, reference, reference_logps, batch):
    prefix = f"dpo_{batch}/grad/"
    gradients = {n.removeprefix(prefix): g.astype(np.float64) for n, g in data.lora.items() if n.startswith(prefix)}
    assert len(gradients) == 16
    low_rank, lora = load_adapter(data.adapter)
    parameters = {name.removeprefix("base_model.model."): x for name, x in low_rank.items()}

    def loss(adapter):
        scorer = Scorer(data, *base, (adapter, lora), reference.features)
        return pair_losses("sigmoid", *scorer(batch), *reference_logps(batch, True), beta=BETA)[0].mean()

    assert_slope(loss, parameters, gradients, {n: g / global_norm(gradients) for n, g in gradients.items()})
    for direction in random_directions(gradients, seed=1, count=3):
        assert_slope(loss, parameters, gradients, direction)


def test_first_adamw_step(data, base, reference, reference_logps):
    """Golden's gradients give the norm before clipping, and one step of ours leads to the loss before its second."""
    low_rank, lora = load_adapter(data.adapter)
    parameters = {name.removeprefix("base_model.model."): x for name, x in low_rank.items()}
    gradients = {name: data.lora[f"dpo_batch0/grad/{name}"] for name in parameters}
    assert global_norm(gradients) == pytest.approx(data.lora["adamw4/grad_norm_before_clip"][0], rel=1e-6)

    optimizer = AdamW(1e-3, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.05, clip_norm=1.0)
    for step, adapter in enumerate([parameters, optimizer.step(parameters, gradients)]):
        scorer = Scorer(data, *base, (adapter, lora), reference.features)
        losses = pair_losses("sigmoid", *scorer("batch0"), *reference_logps("batch0", True), beta=BETA)[0]
        expected = data.lora["adamw4/losses_before_each_step"][step]
        assert losses.mean() == pytest.approx(expected, abs=BETA * LOGPS)


# What holds without golden


def pairs(seed=0, count=16):
    return -10 * np.random.default_rng(seed).random((4, count))


def test_losses_at_known_points():
    same = np.full((4, 1), -7.0)
    counts = {"chosen_tokens": np.array([5.0]), "rejected_tokens": np.array([2.0])}
    assert pair_losses("sigmoid", *same, beta=0.3)[0] == pytest.approx(math.log(2))
    assert pair_losses("sigmoid_norm", *same, beta=0.3, **counts)[0] == pytest.approx(math.log(2))
    assert pair_losses("hinge", *same, beta=0.3)[0] == pytest.approx(1)
    assert pair_losses("ipo", *same, beta=0.25)[0] == pytest.approx(4)
    better = same + np.array([[2.0], [0], [0], [0]])  # the log-ratio of the chosen one is 2
    assert pair_losses("sigmoid", *better, beta=0.5)[0] == pytest.approx(math.log1p(math.exp(-1)))
    assert pair_losses("sigmoid_norm", *better, beta=2.5, **counts)[0] == pytest.approx(math.log1p(math.exp(-1)))
    assert pair_losses("hinge", *better, beta=0.25)[0] == pytest.approx(0.5)
    assert pair_losses("hinge", *better, beta=0.5)[0] == 0
    assert pair_losses("ipo", *better, beta=0.25)[0] == 0
    assert [float(r[0]) for r in pair_losses("sigmoid", *better, beta=0.5)[1:]] == [1.0, 0.0]


def test_robust_loss_is_unbiased():
    """With a share e of the pairs flipped its mean is DPO's loss of the true pairs."""
    pc, pr, rc, rr = pairs()
    for e in (0.0, 0.1, 0.4):
        kept = pair_losses("robust", pc, pr, rc, rr, label_smoothing=e)[0]
        flipped = pair_losses("robust", pr, pc, rr, rc, label_smoothing=e)[0]
        np.testing.assert_allclose((1 - e) * kept + e * flipped, pair_losses("sigmoid", pc, pr, rc, rr)[0], rtol=1e-12)


def test_conservative_loss_is_least_where_the_model_is_as_sure_as_the_labels():
    e, beta = 0.2, 0.1
    x = np.linspace(-60, 60, 4001)
    zero = np.zeros_like(x)
    best = x[pair_losses("sigmoid", x, zero, zero, zero, beta=beta, label_smoothing=e)[0].argmin()]
    assert np.exp(log_sigmoid(beta * best)) == pytest.approx(1 - e, abs=1e-3)


def test_adamw_under_a_constant_gradient():
    """Both moments are then exact from the first step on: every step is lr * (sign of g, nearly, + decay)."""
    g, lr, decay, eps = np.array([3.0, -0.02]), 0.1, 0.5, 1e-8
    optimizer = AdamW(lr, eps=eps, weight_decay=decay)
    ours, expected = {"w": np.array([1.0, 2.0])}, np.array([1.0, 2.0])
    for _ in range(5):
        ours = optimizer.step(ours, {"w": g})
        expected = expected * (1 - lr * decay) - lr * g / (abs(g) + eps)
    np.testing.assert_allclose(ours["w"], expected, rtol=1e-12)


def test_clipping_only_shortens():
    long, short = {"a": np.array([3.0]), "b": np.array([4.0])}, {"a": np.array([0.3]), "b": np.array([0.4])}
    zero = {"a": np.zeros(1), "b": np.zeros(1)}

    def step(gradients, clip_norm):
        # A large eps, so that the length of the gradient is not normalised away.
        updated = AdamW(1.0, eps=1.0, clip_norm=clip_norm).step(zero, gradients)
        return [float(updated[name][0]) for name in "ab"]

    assert step(long, 0.5) == pytest.approx(step(short, None))  # norm 5 brought to 0.5
    assert step(short, 10.0) == step(short, None)


def test_row_of_branches_in_full():
    row = branch_row([5, 6], [[7, 8], [9]], labelled=[[True, False], [True]], length=6, padding=1)
    assert {name: array[0].tolist() for name, array in row.items()} == {
        "tokens": [5, 6, 7, 8, 9, 1],
        "positions": [0, 1, 2, 3, 2, 0],
        "branches": [0, 0, 1, 1, 2, -1],
        "predecessors": [0, 0, 1, 2, 1, 0],
        "labelled": [False, False, True, False, True, False],
    }
