"""`quantize: int8`: a run over frozen weights in 8 bits, from its first loss to what is exported."""

import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from silkie_jax.checkpoints.export import export
from silkie_jax.errors import UserError
from silkie_jax.generation.answer import answer
from silkie_jax.generation.generate import generate
from silkie_jax.loading import load
from silkie_jax.models.qwen_vl.chat import chat_prompt
from silkie_jax.scoring.features import compute_features
from silkie_jax.scoring.reference import compute_reference
from silkie_jax.training import loop
from silkie_jax.training.loop import train
from silkie_jax.training.result import export_run
from tests.training.support import make_run_folder, read_lines, record, run_config, write_corpus

OPTIONS = {"batch_rows": 2, "steps": 3, "checkpoint_every": 1, "remat": "dots", "quantize": "int8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run_folder(tmp_path_factory.mktemp("quantize"))


def config(folder, run, **others):
    return run_config(folder, run, **(OPTIONS | others))


def curve(run):
    names = ("loss", "rewards/chosen", "rewards/margins", "grad_norm", "logps/chosen")
    return [[line[name] for name in names] for line in read_lines(run / "metrics.jsonl")]


def tensors(folder):
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


@pytest.fixture(scope="module")
def run(folder):
    """A finished run in float32, stopped after its first step and continued."""
    asked = iter([True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.StopRequest, "asked", lambda self: next(asked))
        with pytest.raises(KeyboardInterrupt, match="after step 1 of 3"):
            train(config(folder, "run"))
    return train(config(folder, "run"))


def test_in_bfloat16_the_first_loss_is_log_2(folder):
    first = read_lines(train(config(folder, "sixteen", dtype="bfloat16", steps=1)) / "metrics.jsonl")[0]
    assert first["loss"] == np.float32(math.log(2))
    assert first["rewards/margins"] == 0


def test_what_is_exported_is_the_adapter_in_the_original_weights(folder, run, tmp_path):
    export_run(run, tmp_path / "ours")
    export(folder / "model", tmp_path / "expected", adapter=run / "adapter")
    ours, expected, base = map(tensors, (tmp_path / "ours", tmp_path / "expected", folder / "model"))
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    changed = {name for name, array in expected.items() if not np.array_equal(array, base[name])}
    assert changed
    assert all("c_attn" in name or "c_proj" in name or "w1" in name or "w2" in name for name in changed)


@pytest.mark.slow
def test_a_mesh_stored_features_and_a_stored_reference_give_the_same_curve(folder, run):
    stored = {"features": "precomputed", "reference": "precomputed"}
    compute_features(config(folder, "none", **stored))
    compute_reference(config(folder, "none", **stored))
    ours = curve(train(config(folder, "stored", **stored)))
    np.testing.assert_allclose(ours, curve(run), rtol=1e-4, atol=1e-4)
    whole = curve(train(config(folder, "four", batch_rows=4)))
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    meshed = curve(train(config(folder, "meshed", batch_rows=4, mesh=mesh, **stored)))
    np.testing.assert_allclose(meshed, whole, rtol=1e-4, atol=1e-4)


def test_a_reference_of_other_numerics_is_refused_by_name(folder, tmp_path):
    write_corpus(tmp_path / "corpus", [record(n) for n in range(4)])  # one that has no reference in 8 bits
    own = {"corpus": str(tmp_path / "corpus")}
    compute_reference(config(folder, "none", quantize=None, **own))
    with pytest.raises(UserError, match="made with other quantize and weights; run"):
        train(config(folder, "refused", reference="precomputed", **own))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantize": "int3"}, "quantize: 'int3' is unknown; choose one of int8"),
        ({"lora": None}, "is of frozen weights, and lora is null; set quantize=null"),
        ({"train_vision": "resampler"}, "but train_vision is resampler; set quantize=null"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, changes, said):
    with pytest.raises(UserError, match=said):
        config(folder, "none", **changes)


def test_it_answers_as_the_plain_loop_does(folder):
    reply = answer(folder / "model", "What is this?", greedy=True, max_new_tokens=3, quantize="int8")
    model, tokenizer = load(folder / "model", quantize="int8")
    ids = chat_prompt(tokenizer, "What is this?", 0).tokens
    assert model.language.layers.mlp.w1.weight[...].dtype == np.int8
    (expected,) = generate(model, np.array([ids]), None, 3, stop=(tokenizer.im_end, tokenizer.im_start))
    assert reply.tokens == list(expected)
