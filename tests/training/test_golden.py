"""The training step against the original stack: preference batches, their gradients, LoRA, four AdamW steps.

Token ids, labels and masks are golden's own: special tokens were parsed inside its texts.
"""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.hardware.mesh import make_mesh
from silkie_jax.models.qwen_vl.names import adapter_names, leaves
from silkie_jax.nn.attention import PADDING
from silkie_jax.preference.rows import Row
from silkie_jax.training.config_file import make_config
from silkie_jax.training.loop import save_result
from silkie_jax.training.step import Objective
from silkie_jax.training.trainer import Program, Trainer, load_policy, with_adapter_form
from tests.reference.golden import Golden
from tests.reference.objective import IGNORED, log_softmax, pair_losses
from tests.training.support import Steps, as_batch, by_path, collated

LOGPS = 5e-4
GRADIENT = 1e-4
BETA = 0.1


@pytest.fixture(scope="module")
def data(golden):
    return Golden(golden)


@pytest.fixture(scope="module")
def reference(data):
    return load_model(data.checkpoint)


@pytest.fixture(scope="module")
def policy(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "model"
    shutil.copytree(data.checkpoint, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        tensors |= {name: array for name, array in data.policy_overrides.items() if name in tensors}
        save_file(tensors, file)
    return load_model(folder)


@pytest.fixture(scope="module")
def adapted(data):
    return load_model(data.checkpoint, adapter=data.adapter)


def arrays(data, batch):
    """Golden's separate sequences of a batch as rows of two branches, chosen and rejected."""
    tokens, labels, mask = data.pairs(batch)
    rows, images = [], []
    for chosen, rejected in np.split(np.arange(len(tokens)), 2)[0][:, None] + [0, len(tokens) // 2]:
        (prompt, first), (same, second) = (split(tokens[i], labels[i], mask[i] == 1) for i in (chosen, rejected))
        assert prompt == same
        rows.append(row(prompt, [first, second]))
        images.append(data.images(np.array([[token for token, _ in prompt]])))
    most = max(len(i) for i in images)
    filled = [np.concatenate([i, np.zeros((most - len(i), *i.shape[1:]), np.uint8)]) for i in images]
    flat = collated(rows, pad=0) | {"images": np.stack(filled)}
    return {name: array[None] for name, array in flat.items()}


def split(tokens, labels, mask):
    """Prompt [(token, whether it is seen)] and response [(token, whether it is a label)], which begins with a label.

    The original hides an <|endoftext|> inside of a prompt from all other tokens.
    """
    start, end = np.flatnonzero(labels != IGNORED)[0], np.flatnonzero(mask)[-1] + 1
    assert mask[start:end].all()
    prompt = zip(tokens[:start].tolist(), mask[:start].tolist(), strict=True)
    response = zip(tokens[start:end].tolist(), (labels[start:end] != IGNORED).tolist(), strict=True)
    return list(prompt), list(response)


def row(prompt, responses):
    tokens, positions = [token for token, _ in prompt], [*range(len(prompt))]
    branches = [0 if seen else PADDING for _, seen in prompt]
    labelled = []
    for branch, response in enumerate(responses, start=1):
        for offset, (token, is_label) in enumerate(response):
            if is_label:
                labelled.append((len(tokens) - 1 if offset else len(prompt) - 1, token, branch))
            tokens.append(token)
            positions.append(len(prompt) + offset)
            branches.append(branch)
    predecessors, labels, label_branches = np.array(labelled, np.int32).T
    int32 = (np.array(x, np.int32) for x in (tokens, positions, branches))
    pair = np.array([[0, 1]], np.int32)
    return Row("", *int32, predecessors, labels, label_branches, pair, (0, 1), (), 0, (0, 0))


# Log-probabilities


@pytest.mark.parametrize("modes", [("train", "train"), ("train", "eval"), ("eval", "eval")], ids="-".join)
@pytest.mark.parametrize("batch", ["batch0", "batch1"])
def test_logps_losses_and_rewards_of_separate_sequences(data, policy, reference, batch, modes):
    """Through the public call alone, as the original lays the sequences out; batch1 is beyond seq_length."""
    tokens, labels, mask = data.pairs(batch)
    prefix = f"{batch}/policy_{modes[0]}__ref_{modes[1]}"
    logps = []
    for model, mode, name in ((policy, modes[0], "policy"), (reference, modes[1], "ref")):
        logits = np.asarray(model(tokens, data.images(tokens), mask == 1, train=mode == "train"))
        picked = np.take_along_axis(log_softmax(logits[:, :-1]), np.maximum(labels[:, 1:, None], 0), -1)[..., 0]
        sums = np.where(labels[:, 1:] != IGNORED, picked, 0).sum(axis=1)
        for ours, response in zip(np.split(sums, 2), ("chosen", "rejected"), strict=True):
            np.testing.assert_allclose(ours, data.dpo[f"{prefix}/{name}_{response}_logps"], rtol=0, atol=LOGPS)
            logps.append(ours)
    outcome = pair_losses("sigmoid", *logps, beta=BETA)
    for ours, name in zip(outcome, ("losses", "chosen_rewards", "rejected_rewards"), strict=True):
        np.testing.assert_allclose(ours, data.dpo[f"{prefix}/{name}"], rtol=0, atol=BETA * LOGPS)


# Full fine-tuning: the policy differs from the reference, which is a copy of other weights


@pytest.fixture(scope="module")
def full(data, policy, reference):
    steps = Steps(policy, Objective(reference="copy"), reference=reference)
    return {batch: steps(arrays(data, batch)) for batch in ("batch0", "batch1")}


@pytest.mark.parametrize("batch", ["batch0", "batch1"])
def test_metrics_of_full_fine_tuning(data, full, batch):
    metrics, _ = full[batch]
    expected = data.json("dpo")[f"{batch}_trl_metrics"]
    for name, value in metrics.items():
        if name == "loss":
            golden = float(data.dpo[f"{batch}/policy_train__ref_train/loss_mean"])
            assert value == pytest.approx(golden, abs=BETA * LOGPS)
        elif name == "grad_norm":
            norms = [n for n in data.json("dpo")[f"{batch}_grad_l2_norms"].values() if n is not None]
            assert value == pytest.approx(np.linalg.norm(norms), rel=GRADIENT)
        else:
            assert value == pytest.approx(expected[name], abs=LOGPS * (1 if "logps" in name else BETA)), name
    assert set(metrics) - {"loss", "grad_norm"} == {name for name in expected if not name.startswith("logits/")}


@pytest.mark.parametrize("batch", ["batch0", "batch1"])
def test_norm_of_every_gradient(data, policy, full, batch):
    expected = data.json("dpo")[f"{batch}_grad_l2_norms"]
    ours = {name: np.linalg.norm(g) for name, g in official(policy.config, full[batch][1]).items()}
    never_trained = {name for name, norm in expected.items() if norm is None}
    assert never_trained == {"transformer.visual.attn_pool.pos_embed"}
    assert set(ours) == set(expected) - never_trained
    for name, norm in ours.items():
        assert norm == pytest.approx(expected[name], rel=GRADIENT), name


def test_gradients_of_full_fine_tuning(data, policy, full):
    ours = official(policy.config, full["batch0"][1])
    names = [name.removeprefix("batch0/grad/") for name in data.dpo if name.startswith("batch0/grad/")]
    assert len(names) == 14
    for name in names:
        assert_gradient(ours[name], data.dpo[f"batch0/grad/{name}"], name)


def official(config, gradients):
    """Gradients under the official names and in the official shapes."""
    out = {}
    for path, leaf in leaves(config).items():
        if path in gradients:
            layers = gradients[path] if leaf.stacked else gradients[path][None]
            out |= {name: g.reshape(leaf.official) for name, g in zip(leaf.names, layers, strict=True)}
    return out


def assert_gradient(ours, expected, name):
    assert ours.shape == expected.shape
    error, norm = np.linalg.norm(ours - expected), np.linalg.norm(expected)
    assert error <= GRADIENT * norm, f"{name}: {error:.3g} of {norm:.3g}"


# LoRA: the adapter is the policy, the same model without it the reference


@pytest.mark.parametrize("batch", ["batch0", "batch1"])
def test_lora(data, adapted, lora_steps, batch):
    metrics, gradients = lora_steps(arrays(data, batch))
    expected = {name: data.lora[f"dpo_{batch}/{name}"] for name in ("loss_mean", "chosen_rewards", "rejected_rewards")}
    assert metrics["loss"] == pytest.approx(float(expected["loss_mean"]), abs=BETA * LOGPS)
    assert metrics["rewards/chosen"] == pytest.approx(expected["chosen_rewards"].mean(), abs=BETA * LOGPS)
    assert metrics["rewards/rejected"] == pytest.approx(expected["rejected_rewards"].mean(), abs=BETA * LOGPS)
    for side in ("chosen", "rejected"):
        logps = data.lora[f"dpo_{batch}/policy_{side}_logps"]
        assert metrics[f"logps/{side}"] == pytest.approx(logps.mean(), abs=LOGPS)

    prefix = f"dpo_{batch}/grad/"
    ours = peft(adapted.config, gradients)
    expected = {name.removeprefix(prefix): g for name, g in data.lora.items() if name.startswith(prefix)}
    assert sorted(ours) == sorted(expected)
    assert len(ours) == 16
    for name, gradient in expected.items():
        assert_gradient(ours[name], gradient, name)


@pytest.fixture(scope="module")
def lora_steps(adapted):
    return Steps(adapted, Objective(reference="adapter_off"), lora=True, train_vision="none")


def peft(config, state):
    """The factors of the adapters under PEFT's names."""
    out = {}
    for path, leaf in leaves(config).items():
        module = path.removesuffix(".weight")
        if f"{module}.lora_a" not in state:
            continue
        for layer in range(leaf.layers):
            name_a, name_b = (n.removeprefix("base_model.model.") for n in adapter_names(leaf, layer))
            out[name_a] = state[f"{module}.lora_a"][layer]
            out[name_b] = state[f"{module}.lora_b"][layer].reshape(-1, out[name_a].shape[0])
    return out


def test_four_adamw_steps(data, tmp_path):
    optimizer = {"learning_rate": 1e-3, "schedule": "constant", "beta1": 0.9, "beta2": 0.98, "eps": 1e-8}
    config = make_config(
        {"model": str(data.checkpoint), "adapter": str(data.adapter), "corpus": "-", "run_dir": str(tmp_path)}
        | {"optimizer": optimizer | {"weight_decay": 0.05, "clip_norm": 1.0}, "steps": 4, "dtype": "float32"}
        | {"reference": "adapter_off"}
    )
    config = with_adapter_form(config)
    policy = load_policy(config, mesh := make_mesh(data=1))
    program = Program(config, policy.config, mesh, steps=4, policy=policy)
    trainer = Trainer(program, program.start(policy))
    batch = as_batch(arrays(data, "batch0"))
    for step in range(4):
        metrics = trainer.update(batch)
        loss, norm = (data.lora[f"adamw4/{n}"][step] for n in ("losses_before_each_step", "grad_norm_before_clip"))
        assert float(metrics["loss"]) == pytest.approx(float(loss), abs=BETA * LOGPS)
        assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=GRADIENT)

    save_result(trainer, tmp_path)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    prefix = "adamw4/final/"
    final = {name.removeprefix(prefix): x for name, x in data.lora.items() if name.startswith(prefix)}
    assert len(final) == 8
    start = load_file(data.adapter / "adapter_model.safetensors")
    for name, expected in final.items():
        ours, before = saved[f"base_model.model.{name}"], start[f"base_model.model.{name}"]
        # Adam moves every number by about the learning rate, however small its gradient: of what was moved, a share.
        moved = np.linalg.norm(expected - before)
        assert np.linalg.norm(ours - expected) < 1e-3 * moved, name
    assert by_path(trainer.state.trainable)["language.layers.attn.c_attn.lora_a"].dtype == jnp.float32
