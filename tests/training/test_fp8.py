"""`compute: fp8`: products with frozen weights in 8 bits, and policy and reference as one body of a loop."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.errors import UserError
from silkie_jax.hardware.products import check_compute
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer
from silkie_jax.nn.lora import add_lora
from silkie_jax.preference.losses import LossOptions
from silkie_jax.scoring.reference import compute_reference
from silkie_jax.training.loop import train
from silkie_jax.training.step import Objective
from tests.training.support import (
    Steps,
    assert_same_arrays,
    branches_of,
    by_path,
    make_run_folder,
    read_lines,
    record,
    record_row,
    rows_arrays,
    run_config,
)

OPTIONS = {"batch_rows": 2, "steps": 2, "checkpoint_every": 1, "remat": "dots", "compute": "fp8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run_folder(tmp_path_factory.mktemp("fp8"))


def config(folder, run, **others):
    return run_config(folder, run, **(OPTIONS | others))


@pytest.fixture(scope="module")
def run(folder):
    """A run in float32, whose two programs of one model would not agree."""
    return train(config(folder, "run", evaluation_fraction=0.5, evaluate_at_start=True))


def test_the_first_loss_is_log_2(folder, run):
    half = train(config(folder, "half", dtype="bfloat16", steps=1))
    start, *lines = read_lines(run / "metrics.jsonl")
    for first in (read_lines(half / "metrics.jsonl")[0], lines[0]):
        assert first["loss"] == np.float32(math.log(2))
        assert first["rewards/margins"] == first["rewards/chosen"] == 0
    assert start["eval_loss"] == np.float32(math.log(2))
    assert lines[1]["rewards/margins"] != 0


@pytest.mark.slow
def test_on_a_mesh_it_is_too(folder):
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    run = train(config(folder, "meshed", batch_rows=4, mesh=mesh, steps=1, dtype="bfloat16"))
    first = read_lines(run / "metrics.jsonl")[0]
    assert first["loss"] == np.float32(math.log(2))
    assert first["grad_norm"] > 0


@pytest.fixture(scope="module")
def arrays(folder):
    tokenizer = Tokenizer.from_folder(folder / "model")
    return rows_arrays(tokenizer, [record_row(tokenizer, record(n, images=n % 2)) for n in range(2)])


def policy(folder, seed=0, **options):
    """With an adapter that has learned something."""
    model = load_model(folder / "model", **options)
    add_lora(model, 2, 8, ["c_attn", "attn.c_proj", "w1", "w2"], rngs=nnx.Rngs(seed))
    state = nnx.state(model, nnx.LoRAParam)
    key = jax.random.key(seed)
    nnx.update(model, jax.tree.map(lambda x: x + 0.05 * jax.random.normal(key, x.shape, x.dtype), state))
    return model


def measure(model, arrays, reference, one_body, other=None, **options):
    """Metrics, gradients, and what an evaluation says."""
    objective = Objective("sigmoid", LossOptions(0.1, **options), reference, "dots", one_body=one_body)
    steps = Steps(model, objective, lora=True, train_vision="none", reference=other)
    metrics, gradients = steps(arrays)
    found, _ = steps.step.evaluate(
        steps.trainable, steps.memory, steps.frozen, steps.reference, arrays, branches=branches_of(arrays)
    )
    return metrics, gradients, {name: float(value) for name, value in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["adapter_off", "copy"])
def test_one_body_computes_what_two_passes_do(folder, arrays, reference):
    model = policy(folder)
    other = policy(folder, seed=1) if reference == "copy" else None
    once, twice = (measure(model, arrays, reference, body, other, sft_weight=0.5) for body in (False, True))
    for ours, expected in ((twice[0], once[0]), (twice[2], once[2])):
        assert ours == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert abs(once[0]["rewards/margins"]) > 0.01
    assert_same_arrays(twice[1], once[1], rtol=1e-4)


@pytest.mark.slow
def test_gradients_of_the_adapter_are_near_those_without(folder, arrays):
    found = {}
    for quantize in (None, "int8", "fp8"):
        _, found[quantize], _ = measure(policy(folder, quantize=quantize), arrays, "adapter_off", quantize == "fp8")
    exact, eight, fp8 = (np.concatenate([x.ravel() for x in found[key].values()]) for key in (None, "int8", "fp8"))

    def apart(values):
        return np.linalg.norm(values - exact) / np.linalg.norm(exact)

    # Of random weights, in which errors grow from layer to layer: three to four times those of int8.
    assert 0 < apart(eight) < apart(fp8) < 6 * apart(eight)
    assert fp8 @ exact > 0.9 * np.linalg.norm(fp8) * np.linalg.norm(exact)


def test_a_run_goes_on_with_the_same_products_only(folder, run):
    with pytest.raises(UserError, match="compute was 'fp8' and is None; use a new run_dir"):
        train(config(folder, "run", compute=None, evaluation_fraction=0.5))
    assert train(config(folder, "run", evaluation_fraction=0.5)) == run


def test_a_stored_reference_is_of_the_same_products(folder):
    stored = {"reference": "precomputed", "steps": 1}
    compute_reference(config(folder, "none", **stored))
    ours = read_lines(train(config(folder, "stored", **stored)) / "metrics.jsonl")[0]
    assert ours["loss"] == pytest.approx(math.log(2), abs=0.05)  # of another program
    with pytest.raises(UserError, match="made with other weights and compute; run"):
        train(config(folder, "refused", **stored, compute=None))


def test_the_trained_adapter_is_in_float32_over_codes(folder):
    model = policy(folder, quantize="fp8", dtype="bfloat16")
    codes = by_path(nnx.state(model, nnx.Param))
    coded = {name for name, array in codes.items() if array.dtype == jnp.float8_e4m3fn}
    assert {"language.layers.mlp.w1.weight", "visual.layers.attn.in_proj.weight"} <= coded
    assert not any(part in name for name in coded for part in ("ln_", "lm_head", "attn_pool", "bias", "wte", "lora"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compute": "fp4"}, "compute: 'fp4' is unknown; choose one of fp8"),
        ({"lora": None}, "compute fp8 is of frozen weights, and lora is null; set compute=null"),
        ({"train_vision": "all"}, "but train_vision is all; set compute=null"),
        ({"quantize": "int8"}, "compute fp8 keeps frozen weights in 8 bits of its own; set quantize=null"),
        ({"loss": "vdpo"}, "loss vdpo wants more of the reference .* set compute=null or reference=precomputed"),
        ({"loss": {"name": "spa", "extrapolation": 0.5}}, "loss spa wants more of the reference .* set compute=null$"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, changes, said):
    with pytest.raises(UserError, match=said):
        config(folder, "none", **changes)


def test_machines_without_such_products_are_refused():
    def mesh(platform, kind, **more):
        return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform, device_kind=kind, **more)]))

    check_compute("fp8", mesh("cuda", "NVIDIA H200", compute_capability="9.0"))
    check_compute("fp8", mesh("gpu", "NVIDIA L4", compute_capability="8.9"))
    check_compute("fp8", mesh("gpu", "NVIDIA B200", compute_capability="10.0"))
    check_compute(None, mesh("tpu", "TPU v5e"))
    for wrong in (mesh("cuda", "NVIDIA A100", compute_capability="8.0"), mesh("tpu", "TPU v5e")):
        with pytest.raises(UserError, match=r"Ada and Hopper on, and this is .*(A100|v5e); set compute=null"):
            check_compute("fp8", wrong)
