"""`silkie compile`: what it reads from compiled programs, and whole forecasts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from silkie_jax.errors import UserError
from silkie_jax.forecast.collectives import collective_bytes
from silkie_jax.forecast.forecast import Lengths
from silkie_jax.hardware.chips import find_chip, find_gpu
from silkie_jax.models.qwen_vl.config import QWEN_VL_CHAT, QwenVLConfig
from silkie_jax.models.qwen_vl.flops import Training, decoder_forward, step_flops
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.preference.counts import Work, row_work
from tests.training.support import make_tiny

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

PROGRAM = """
%fused.1 (p: bf16[4,64]) -> bf16[4,1024] {
  ROOT %all-gather.1 = bf16[4,1024]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,16]<=[16], dimensions={1}
}

%fused.2 (p: bf16[4,64]) -> bf16[4,1024] {
  ROOT %all-gather.2 = bf16[4,1024]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,16]<=[16], dimensions={1}
}

%condition (p: (u32[], f32[8])) -> pred[] {
  %limit = u32[] constant(8)
  %p = (u32[], f32[8]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (p: (u32[], f32[8])) -> (u32[], f32[8]) {
  %two = u32[] constant(2)
  %p = (u32[], f32[8]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[8] get-tuple-element(%p), index=1
  %next = u32[] add(%i, %two)
  %moved = f32[8]{0} collective-permute(%x), channel_id=9, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (u32[], f32[8]) tuple(%next, %moved)
}

ENTRY %main (a: bf16[4,64], b: (u32[], f32[8])) -> f32[10] {
  %first = bf16[4,1024] fusion(%a), kind=kCustom, calls=%fused.1
  %beside = bf16[4,1024] fusion(%a), kind=kCustom, calls=%fused.2
  %loop = (u32[], f32[8]) while(%b), condition=%condition, body=%body
  %known = (u32[], f32[8]) while(%b), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %sum = f32[10]{0} all-reduce(%c), channel_id=11, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_collectives_count_as_often_as_they_run_and_once_a_channel():
    """A gather in two pieces is one; a loop to 8 in steps of 2 runs 4 times; an all-reduce is sent twice."""
    found = collective_bytes(PROGRAM)
    assert found["all-gather"] == 4 * 1024 * 2 * 15 / 16
    assert found["collective-permute"] == (4 + 3) * 8 * 4
    assert found["all-reduce"] == 2 * 10 * 4 * 3 / 4


STARTED = """
ENTRY %main (a: bf16[4,64], b: bf16[2,64]) -> f32[10] {
  %both = ((bf16[4,64]{1,0}, bf16[2,64]{1,0}), (bf16[4,1024]{1,0}, bf16[2,1024]{1,0})) all-gather-start(%a, %b), channel_id=1, replica_groups=[1,16]<=[16], dimensions={1}
  %sums = (f32[10]{0}, f32[30]{0}) all-reduce-start(%c, %d), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  %moved = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%e), channel_id=3, source_target_pairs={{0,1}}
  ROOT %out = f32[10]{0} all-reduce-done(%sums)
}
"""  # noqa: E501


def test_several_collectives_that_start_as_one_are_all_counted():
    found = collective_bytes(STARTED)
    assert found["all-gather"] == (4 + 2) * 1024 * 2 * 15 / 16
    assert found["all-reduce"] == 2 * (10 + 30) * 4 * 3 / 4
    assert found["collective-permute"] == 8 * 4


@pytest.mark.parametrize(("remat", "terms"), [("full", 44e12), ("none", 32e12)])
def test_work_of_an_instruction_at_full_size(remat, terms):
    """A prompt of 330 tokens with an image and four responses of 150, LoRA, stored reference: worked out by hand."""
    lora = Training(64, ("c_attn", "attn.c_proj", "w1", "w2"), remat=remat)
    work = row_work(330, [150] * 4, 4 * 148, images=1)
    assert step_flops(QWEN_VL_CHAT, work, lora).hardware == pytest.approx(terms, rel=0.05)


def test_matmuls_of_the_decoder_are_those_that_xla_counts(tmp_path):
    """One layer, so that no loop hides any; the embedding and the norms multiply no matrices."""
    config = dataclasses.replace(QwenVLConfig.from_folder(make_tiny(tmp_path / "model")), num_hidden_layers=1)
    model = nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    tokens = jax.ShapeDtypeStruct((1, 96), jnp.int32)

    def forward(state, tokens):
        policy = nnx.merge(graph, state)
        hidden = policy.hidden(tokens, tokens, jnp.zeros_like(tokens), None, train=True)
        return policy.language.logits(hidden)

    counted = jax.jit(forward).lower(state, tokens).compile().cost_analysis()["flops"]
    work = Work(rows=1, tokens=96, visible=96 * 96, labels=96)
    logits = 2 * 96 * config.hidden_size * config.vocab_size
    assert decoder_forward(config, work) + logits == pytest.approx(counted, rel=0.1)


def test_lengths_fill_what_rows_are_padded_to():
    assert Lengths.of(1024) == Lengths()
    longer = Lengths.of(2048)
    assert 1800 < longer.prompt + sum(longer.responses) <= 2048
    assert sum(longer.responses) <= longer.labels < sum(longer.responses) + 128
    with pytest.raises(UserError, match="--tokens 256"):
        Lengths.of(256)


def test_chips_by_the_names_that_jax_gives_them():
    assert find_chip("TPU v5 lite").name == "TPU v5 lite"
    assert find_chip("TPU v5").name == "TPU v5"
    assert find_chip("TPU v5p").name == "TPU v5"
    assert find_chip("TPU v5e").name == "TPU v5 lite"
    assert find_chip("TPU v6e").name == "TPU v6 lite"
    assert find_chip("NVIDIA H100 80GB HBM3").name == "H100"
    assert find_chip("cpu") is None
    assert find_gpu("h200").chip.name == "H200"
    assert find_gpu("v5e") is None


def silkie_compile(*arguments: object) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "silkie_jax.cli", "compile", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


def test_a_dry_run_on_pretended_devices(tmp_path):
    make_tiny(tmp_path / "model")
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {tmp_path / 'model'}\ncorpus: none\nrun_dir: none\nlora: {{rank: 4}}\nbatch_rows: 4\n")
    done = silkie_compile(config, "--topology", "cpu:4", "--tokens", 640, "--json", "mesh.fsdp=2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["chips"], found["rows"], found["fits"]) == (4, 4, True)
    assert found["flops"] > 0
    assert found["collectives"]["all-gather"] > 0


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("cpu:0", "silkie: --topology cpu:0: write cpu:N with N devices"),
        ("h100:many", "silkie: --topology h100:many: write h100:N with N devices"),
    ],
)
def test_topologies_that_are_none(topology, message):
    done = silkie_compile(CONFIGS / "silkie.yaml", "--topology", topology)
    assert (done.returncode, done.stderr.strip()) == (1, message)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "topology"), [("silkie-v5e-16", "v5e:4x4"), ("silkie-v5e-256", "v5e:16x16")])
def test_the_recipe_fits_pods_at_full_size(config, topology):
    """By the real TPU compiler, in the one-pass kernel's real form."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (make test-compile brings it)")
    done = silkie_compile(CONFIGS / f"{config}.yaml", "--topology", topology, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"]
    assert found["memory_bytes"] == 16 * 2**30
    assert found["rows"] >= 64
    assert found["argument_bytes"] * found["chips"] > 19e9  # 9.66 billion parameters


@pytest.mark.slow
def test_the_recipe_fits_one_gpu_of_80_gb_at_full_size():
    """By XLA's real compiler for Hopper, with the one-pass kernel as Triton compiles it."""
    pytest.importorskip("jax_cuda12_plugin", reason="XLA's compiler for GPUs is not installed (the cuda12 extra)")
    done = silkie_compile(CONFIGS / "silkie-1x80gb.yaml", "--topology", "h100:1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"]
    assert 19e9 < found["argument_bytes"] < found["peak_bytes"] < 72e9
