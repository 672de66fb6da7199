"""The step against the NumPy oracle (no reference data needed), what it trains, and its optimizer."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.hardware.mesh import make_mesh
from silkie_jax.models.qwen_vl.image import read_image
from silkie_jax.models.qwen_vl.names import leaves
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.nn.lora import add_lora
from silkie_jax.preference.losses import LossOptions
from silkie_jax.preference.rows import encode_prompt, encode_response, make_row
from silkie_jax.training.config_file import make_config
from silkie_jax.training.loop import save_result
from silkie_jax.training.optimizer import decay_mask, make_optimizer, make_schedule, part_of, trainable_filter
from silkie_jax.training.step import Objective
from silkie_jax.training.trainer import Program, Trainer, load_policy
from tests.reference.objective import AdamW, log_softmax, pair_losses
from tests.reference.qwen_vl import QwenVL, load_checkpoint
from tests.training.support import (
    SIDE,
    Steps,
    all_pairs,
    as_batch,
    assert_same_arrays,
    by_path,
    make_tiny,
    record,
    record_row,
    rows_arrays,
)

BETA = 0.02
FROZEN = "visual.attn_pool.pos_embed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def records():
    """With and without a picture; two and three responses."""
    return [record(0, (3, 1)), record(3, (4, 2, 1), images=0)]


@pytest.fixture(scope="module")
def oracle(folder):
    return Oracle(folder)


class Oracle:
    """Log-probabilities of responses as separate sequences, in float64."""

    def __init__(self, folder):
        self.tensors, self.config = load_checkpoint(folder)
        self.tokenizer = Tokenizer.from_folder(folder)

    def logps(self, made, tensors=None):
        """Of each response: the sum over its labels, and how many those are."""
        net = QwenVL(tensors or self.tensors, self.config)
        images = np.stack([read_image(data, SIDE) for data in made.images]) if made.images else None
        prompt, sums, counts = encode_prompt(self.tokenizer, made), [], []
        for response in made.responses:
            ids, labelled = encode_response(self.tokenizer, response.text)
            logps = log_softmax(net(np.array([prompt + ids]), images, train=True))[0]
            at = np.flatnonzero(labelled)
            sums.append(logps[len(prompt) + at - 1, np.array(ids)[at]].sum())
            counts.append(len(at))
        return np.array(sums), np.array(counts)

    def hits(self, made, tensors):
        """Of each response: its labels that no other token is more probable than."""
        net = QwenVL(tensors, self.config)
        images = np.stack([read_image(data, SIDE) for data in made.images]) if made.images else None
        prompt, found = encode_prompt(self.tokenizer, made), []
        for response in made.responses:
            ids, labelled = encode_response(self.tokenizer, response.text)
            said = net(np.array([prompt + ids]), images, train=True)[0].argmax(-1)
            at = np.flatnonzero(labelled)
            found.append((said[len(prompt) + at - 1] == np.array(ids)[at]).sum())
        return np.array(found)


# Against the oracle


def test_supervised_loss_is_the_mean_cross_entropy_of_all_labels(tokenizer, model, oracle, records):
    rows = [make_row(tokenizer, r, responses=[0, 1]) for r in records]
    metrics, _ = Steps(model, Objective(reference=None))(rows_arrays(tokenizer, rows))
    found = [oracle.logps(r) for r in records]
    logp, labels = (sum(values[i][:2].sum() for values in found) for i in (0, 1))
    assert set(metrics) == {"loss", "mean_token_accuracy", "grad_norm"}
    assert metrics["loss"] == pytest.approx(-logp / labels, rel=1e-5)


def test_token_accuracy_is_the_share_of_labels_that_the_oracle_finds_most_probable(tokenizer, folder, oracle, records):
    """Accumulated or not, with a trained and with a frozen head, and after a change of the head that makes the share
    neither 0 nor 1."""
    changed = load_model(folder)
    (official_head,) = leaves(changed.config)["language.lm_head.weight"].names
    tensors = oracle.tensors | {official_head: oracle.tensors[official_head].copy()}
    liked = sorted({t for r in records for t in encode_response(tokenizer, r.responses[0].text)[0]})
    tensors[official_head][liked] *= 6
    changed.language.lm_head.weight[...] = jnp.asarray(tensors[official_head], jnp.float32)
    hits = sum(oracle.hits(r, tensors)[:2].sum() for r in records)
    labels = sum(oracle.logps(r)[1][:2].sum() for r in records)
    assert 0.02 < hits / labels < 0.98
    rows = [make_row(tokenizer, r, responses=[0, 1]) for r in records]
    for lora in (False, True):
        if lora:
            add_lora(changed, 2, 4, ["c_attn"], rngs=nnx.Rngs(0))
        steps = Steps(changed, Objective(reference=None), lora=lora)
        for accumulate in (1, 2):
            metrics, _ = steps(rows_arrays(tokenizer, rows, accumulate=accumulate))
            assert metrics["mean_token_accuracy"] == pytest.approx(hits / labels, rel=1e-6)


@pytest.fixture(scope="module")
def preference(tokenizer, folder, model, records):
    """A policy that is not its reference: metrics and gradients, and the reference's parameters."""
    reference = load_model(folder)
    state = nnx.state(reference)
    key = jax.random.key(0)
    moved = jax.tree.map(lambda x: x * (1 + 0.02 * jax.random.normal(key, x.shape)), state)
    moved["visual"]["attn_pool"]["pos_embed"] = state["visual"]["attn_pool"]["pos_embed"]
    nnx.update(reference, moved)
    steps = Steps(model, Objective("sigmoid", LossOptions(BETA, 0.1), "copy"), reference=reference)
    metrics, gradients = steps(rows_arrays(tokenizer, [record_row(tokenizer, r) for r in records]))
    return metrics, gradients, by_path(nnx.state(reference))


def test_preference_metrics(oracle, model, records, preference):
    metrics, _, reference = preference
    columns = {"policy": [], "reference": []}
    reference = official(model.config, reference)
    for made in records:
        pairs = np.array(all_pairs(len(made.responses)))
        for name, tensors in (("policy", None), ("reference", reference)):
            columns[name].append(oracle.logps(made, tensors)[0][pairs])
    policy, reference = (np.concatenate(columns[name]) for name in ("policy", "reference"))
    losses, chosen, rejected = pair_losses("sigmoid", *policy.T, *reference.T, beta=BETA, label_smoothing=0.1)
    expected = {
        "loss": losses.mean(),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
        "logps/chosen": policy[:, 0].mean(),
        "logps/rejected": policy[:, 1].mean(),
    }
    assert set(metrics) == {*expected, "grad_norm"}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust"])
def test_the_likelihood_of_chosen_responses_is_added_to_every_loss(tokenizer, model, oracle, records, loss):
    """loss + weight x -log pi(chosen) / tokens of it, the mean over all pairs of two accumulated batches."""
    weight, rows = 0.7, rows_arrays(tokenizer, [record_row(tokenizer, r) for r in records], accumulate=2)
    nll = []
    for made in records:
        logps, tokens = oracle.logps(made)
        nll += [-logps[chosen] / tokens[chosen] for chosen, _ in all_pairs(len(made.responses))]
    found = {}
    for sft_weight in (0.0, weight):
        objective = Objective(loss, LossOptions(BETA, 0.0, sft_weight), "copy")
        found[sft_weight], _ = Steps(model, objective, reference=model)(rows)
    assert "sft_loss" not in found[0.0]
    assert found[weight]["sft_loss"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert found[weight]["loss"] == pytest.approx(found[0.0]["loss"] + weight * np.mean(nll), rel=1e-5)
    assert found[weight]["rewards/margins"] == found[0.0]["rewards/margins"]


def official(config, arrays):
    """Our tree under the official names, float64."""
    out = {}
    for path, leaf in leaves(config).items():
        layers = arrays[path] if leaf.stacked else arrays[path][None]
        for name, array in zip(leaf.names, layers, strict=True):
            out[name] = array.reshape(leaf.official).astype(np.float64)
    return out


def test_slope_of_the_oracles_loss_is_the_gradient(oracle, model, records, preference):
    """Along random directions in which every weight takes part, towers included."""
    _, gradients, reference = preference
    reference = official(model.config, reference)
    fixed = [oracle.logps(made, reference)[0] for made in records]
    gradients = official(model.config, gradients | {FROZEN: np.zeros_like(model.visual.attn_pool.pos_embed[...])})

    def loss(tensors):
        losses = []
        for made, base in zip(records, fixed, strict=True):
            pairs = np.array(all_pairs(len(made.responses)))
            policy = oracle.logps(made, tensors)[0]
            pair = (*policy[pairs].T, *base[pairs].T)
            losses.append(pair_losses("sigmoid", *pair, beta=BETA, label_smoothing=0.1)[0])
        return np.concatenate(losses).mean()

    rng = np.random.default_rng(0)
    for _ in range(2):
        # Each weight moves in inverse proportion to its gradient, so that all of them weigh alike.
        norms = {name: np.linalg.norm(g) for name, g in gradients.items()}
        direction = {n: rng.standard_normal(g.shape) / norms[n] for n, g in gradients.items() if norms[n]}
        step = 1e-4 / math.sqrt(sum((d**2).sum() for d in direction.values()))

        def moved(by, direction=direction):
            return {n: x + by * direction[n] if n in direction else x for n, x in oracle.tensors.items()}

        slope = (loss(moved(step)) - loss(moved(-step))) / (2 * step)
        assert sum((gradients[n] * d).sum() for n, d in direction.items()) == pytest.approx(slope, rel=1e-3)


# What is trained


def trained(model, **options):
    chosen = trainable_filter(**options)
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.split(model, chosen, ...)[1])}


def test_what_each_choice_trains(folder):
    model = load_model(folder)
    add_lora(model, 2, 4, ["c_attn"], rngs=nnx.Rngs(0))
    everything = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    factors = {"language.layers.attn.c_attn.lora_a", "language.layers.attn.c_attn.lora_b"}
    visual = {name for name in everything if name.startswith("visual.")} - {FROZEN}
    resampler = {n for n in visual if n.split(".")[1] in ("attn_pool", "ln_post", "proj")}
    language = everything - visual - {FROZEN}
    assert len(resampler) == 13
    for lora, decoder in ((True, factors), (False, language)):
        assert trained(model, lora=lora, train_vision="none") == decoder
        assert trained(model, lora=lora, train_vision="resampler") == decoder | resampler
        assert trained(model, lora=lora, train_vision="all") == decoder | visual


@pytest.fixture(scope="module")
def batch(tokenizer):
    return as_batch(rows_arrays(tokenizer, [record_row(tokenizer, record(0, (3, 1)))]))


def trainer(folder, tmp_path, **values):
    given = {"model": str(folder), "corpus": "-", "run_dir": str(tmp_path), "steps": 3, "dtype": "float32"}
    given |= {"optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0}}
    config, mesh = make_config(given | values), make_mesh(data=1)
    policy = load_policy(config, mesh)
    program = Program(config, policy.config, mesh, config.steps, policy)
    return Trainer(program, program.start(policy))


@pytest.mark.parametrize(
    ("values", "moves"),
    [
        ({"lora": None}, "language"),
        ({"lora": {"rank": 2}, "train_vision": "resampler"}, "resampler"),
        ({"lora": None, "train_vision": "all"}, "everything"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_what_should_train_changes(folder, tmp_path, batch, values, moves):
    """Also against a copy as reference, which starts at no difference and stays what it was."""
    run = trainer(folder, tmp_path, **values)
    assert run.program.config.reference == "copy"
    first = run.update(batch)
    assert float(first["loss"]) == pytest.approx(math.log(2), rel=1e-6)
    assert float(first["rewards/margins"]) == 0
    second = run.update(batch)
    assert float(second["rewards/margins"]) > 0
    assert float(second["loss"]) < math.log(2)
    save_result(run, tmp_path)
    before, after = (by_path(nnx.state(load_model(path))) for path in (folder, tmp_path / "model"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    parts = {
        "language": {name for name in before if name.startswith("language.")},
        "resampler": trained(load_model(folder), lora=True, train_vision="resampler"),
        "everything": set(before) - {FROZEN},
    }
    # Numbers of tokens and positions that no row holds move by weight decay alone, but they do move.
    assert changed == parts[moves]
    assert (tmp_path / "adapter").exists() == bool(values["lora"])
    assert json.loads((tmp_path / "model" / "silkie.json").read_text())


def test_trained_weights_stay_float32_in_bfloat16(folder, tmp_path, batch):
    run = trainer(folder, tmp_path, dtype="bfloat16", lora=None, optimizer={"learning_rate": 1e-6, "warmup_ratio": 0})

    def types(state):
        return {x.dtype.name for x in jax.tree.leaves(state)}

    before = by_path(run.state.trainable)
    for _ in range(2):
        metrics = run.update(batch)
        assert types(run.state.trainable) == {"float32"}
        assert types(run.state.frozen) == {"bfloat16"}
        assert {x.dtype.name for x in jax.tree.leaves(run.state.optimizer)} == {"float32", "int32"}
    assert float(metrics["rewards/margins"]) != 0
    after = by_path(run.state.trainable)
    name = "language.layers.mlp.w1.weight"
    moved = np.abs(after[name] - before[name])
    # Such small steps would vanish in bfloat16.
    assert 0.5e-6 < np.median(moved) < 3e-6
    rounded = [np.asarray(jnp.asarray(x[name], jnp.bfloat16)) for x in (before, after)]
    assert (rounded[0] == rounded[1]).mean() > 0.9


def test_the_reference_of_an_adapter_that_was_trained_before_is_that_or_by_name_the_base(folder, tmp_path, batch):
    run = trainer(folder, tmp_path / "a", lora={"rank": 2})
    assert float(run.update(batch)["rewards/margins"]) == 0
    run.update(batch)
    save_result(run, tmp_path / "a")
    again = trainer(folder, tmp_path / "b", adapter=str(tmp_path / "a" / "adapter"), reference="adapter_off")
    assert float(again.update(batch)["rewards/margins"]) > 0
    copied = trainer(folder, tmp_path / "b", adapter=str(tmp_path / "a" / "adapter"))
    assert float(copied.update(batch)["rewards/margins"]) == 0


def test_accumulated_batches_are_one_batch(tokenizer, model):
    """Also with unequal numbers of pairs in them, one of them without any."""
    made = [record(n, ratings, images=0) for n, ratings in enumerate([(3, 1), (4, 2, 1), (1, 2), (2, 1, 3)])]
    rows = [*(record_row(tokenizer, r) for r in made), None, None]
    steps = Steps(model, Objective("sigmoid", LossOptions(BETA), "copy"), reference=model)
    one, one_gradient = steps(rows_arrays(tokenizer, rows))
    three, three_gradient = steps(rows_arrays(tokenizer, rows, accumulate=3))
    assert three == pytest.approx(one, rel=1e-5, abs=1e-6)
    assert_same_arrays(three_gradient, one_gradient, 1e-5)


# Optimizer


def test_warm_up_and_cosine_are_those_of_transformers():
    """get_cosine_schedule_with_warmup and get_linear_schedule_with_warmup; the warm-up is ceil(steps x ratio)."""
    for steps, ratio in ((100, 0.1), (7, 0.5), (10, 0.0), (5, 0.01), (1, 0.0)):
        warmup = math.ceil(steps * ratio)
        rates = {name: make_schedule(name, 2e-3, steps, ratio) for name in ("cosine", "linear", "constant")}
        for step in range(steps + 1):
            progress = (step - warmup) / max(1, steps - warmup)
            after = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1}
            for name, rate in rates.items():
                expected = step / warmup if step < warmup else after[name]
                assert float(rate(step)) == pytest.approx(2e-3 * expected, rel=1e-5, abs=1e-9), (name, step)


@pytest.mark.parametrize("clip_norm", [None, 0.5, 100.0])
def test_adamw_with_clipping_is_the_oracles(clip_norm):
    rng = np.random.default_rng(0)
    parameters = {"a": rng.standard_normal((3, 4)), "b": rng.standard_normal(5)}
    settings = {"beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.05, "clip_norm": clip_norm}
    oracle, ours = AdamW(1e-2, **settings), make_optimizer(optax.constant_schedule(1e-2), **settings)
    values = jax.tree.map(jnp.asarray, parameters)
    state = ours.init(values)
    for _ in range(5):
        gradients = {name: rng.standard_normal(x.shape) for name, x in parameters.items()}
        updates, state = ours.update(jax.tree.map(jnp.asarray, gradients), state, values)
        values, parameters = optax.apply_updates(values, updates), oracle.step(parameters, gradients)
        for name, expected in parameters.items():
            np.testing.assert_allclose(values[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_parts_with_rates_of_their_own_move_as_adamw_at_those_rates(folder, tmp_path, batch):
    """Each as in a run whose only rate that is: under a schedule, with weight decay, clipped by one norm."""
    rates = {"decoder": 1e-3, "resampler": 4e-3, "vision": 2.5e-4}
    shared = {"schedule": "linear", "warmup_ratio": 0.4, "weight_decay": 0.1, "clip_norm": 0.5}

    def moved(learning_rate, **own):
        optimizer = {"learning_rate": learning_rate, **shared, **own}
        values = {"lora": None, "train_vision": "all", "objective": "sft", "steps": 5, "optimizer": optimizer}
        run = trainer(folder, tmp_path, **values)
        for _ in range(2):  # the first one of a warm-up has rate 0
            run.update(batch)
        return by_path(run.state.trainable), run

    ours, run = moved(1e-3, resampler_learning_rate=4e-3, vision_learning_rate=2.5e-4)
    assert run.learning_rates(skipped=False) == pytest.approx(
        {"learning_rate": 5e-4, "resampler_learning_rate": 2e-3, "vision_learning_rate": 1.25e-4}
    )
    start = by_path(nnx.state(load_model(folder)))
    parts = {name: part_of(tuple(name.split("."))) for name in ours}
    assert set(parts.values()) == set(rates)
    for part, rate in rates.items():
        alone, other = moved(rate)
        assert set(other.learning_rates(skipped=False)) == {"learning_rate"}
        for name in (name for name, of in parts.items() if of == part):
            largest = np.abs(alone[name] - start[name]).max()
            assert largest > 0, name
            # The two round each weight differently, by a unit in its last place.
            np.testing.assert_allclose(ours[name], alone[name], rtol=3e-7, atol=1e-4 * largest, err_msg=name)


def test_weight_decay_spares_biases_and_norms(folder):
    model = load_model(folder)
    add_lora(model, 2, 4, ["c_attn"], rngs=nnx.Rngs(0))
    decayed = {".".join(map(str, path)): bool(on) for path, on in nnx.to_flat_state(decay_mask(nnx.state(model)))}
    spared = {name for name, on in decayed.items() if not on}
    assert spared == {name for name in decayed if name.endswith(".bias") or "ln_" in name}
    assert len(spared) == 22
    assert decayed["language.layers.attn.c_attn.lora_a"]
    assert decayed["language.wte"]
