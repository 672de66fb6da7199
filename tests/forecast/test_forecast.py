"""`silkie compile`: what it reads from compiled programs, and whole forecasts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from silkie_jax.errors import UserError
from silkie_jax.forecast.collectives import collective_bytes
from silkie_jax.forecast.forecast import _an_epoch, _Compiler, forecast
from silkie_jax.forecast.lengths import Steps, equal_sizes, published_sizes, work_of
from silkie_jax.hardware.chips import find_chip, find_gpu
from silkie_jax.models.qwen_vl.config import QWEN_VL_CHAT, QwenVLConfig
from silkie_jax.models.qwen_vl.flops import Training, decoder_forward, step_flops
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.preference.counts import Work, row_work
from silkie_jax.preference.grid import Grid, bucket
from silkie_jax.preference.plan import Plan
from silkie_jax.training.config_file import make_config
from tests.training.support import make_tiny, record, write_corpus

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


@pytest.mark.parametrize("tokens", [512, 1024, 2048, 7296])
def test_equal_rows_fill_what_they_are_padded_to(tokens):
    rows = equal_sizes(tokens, "dpo")
    assert {bucket(int(n)) for n in np.unique(rows[:, 0])} == {tokens}
    assert rows[:, 2].mean() == pytest.approx(4.75, abs=1e-3)
    finely = equal_sizes(tokens, "dpo", fine=True)
    assert {bucket(int(n), fine=True) for n in np.unique(finely[:, 0])} == {tokens}
    if tokens == 1024:
        assert work_of(rows) == row_work(330, [150] * 4, 4 * 148) * len(rows) + Work(pairs=int(rows[:, 2].sum()))


def test_the_published_means_fill_960_where_padding_is_fine():
    assert equal_sizes(960, "dpo", fine=True)[0, 0] == 930


@pytest.mark.parametrize("tokens", [256, 1000])
def test_lengths_that_rows_are_not_padded_to_are_refused(tokens):
    with pytest.raises(UserError, match=f"--tokens {tokens}: rows are padded to multiples of 128; give 512 or more"):
        equal_sizes(tokens, "dpo")


@pytest.mark.parametrize(("objective", "branches"), [("dpo", 4), ("sft", 1)])
def test_published_rows_have_the_published_means_and_a_tail(objective, branches):
    tokens, labels, pairs, images, each, _ = published_sizes(2048, objective).T
    assert len(tokens) == 80_258
    assert tokens.mean() == pytest.approx(330 + branches * 150, rel=0.03)
    assert labels.mean() == pytest.approx(branches * 148, rel=0.03)
    assert tokens.max() > 2 * tokens.mean()
    assert (tokens - labels - 2 * branches).min() > 256  # a prompt has its image
    assert (images == 1).all()
    assert (each == branches).all()
    assert (pairs > 0).all() == (objective == "dpo")
    short = published_sizes(512, objective)
    assert (short[:, 0] <= 330 * 2 + 512 * branches).all()


def test_published_rows_of_sft_hold_the_responses_that_it_imitates():
    for imitate, branches in (("chosen", 1), ("best", 1), ("all", 4)):
        tokens, _, pairs, _, each, _ = published_sizes(2048, "sft", imitate).T
        assert (each == branches).all()
        assert tokens.mean() == pytest.approx(330 + branches * 150, rel=0.03)
        assert not pairs.any()
        work = work_of(published_sizes(2048, "sft", imitate))
        assert work.responses == branches * work.rows


def counted(rows, objective="dpo", **limits):
    """Steps over rows of few lengths, many of them short."""
    lengths = np.repeat([900, 1500, 5000], [800, 150, 50])
    sizes = np.stack([lengths, lengths // 2, *[np.ones(1000, int)] * 4], axis=1)
    return Steps(Grid(Plan(sizes, rows), rows=rows, **limits), "")


class Pretended:
    """A compiler whose programs have 100 bytes of arguments and one more for each token at once."""

    def __init__(self, refuses: float = float("inf")):
        self.refuses, self.compiled = refuses, []

    def lower(self, shape):
        self.compiled.append(shape)
        temporary = shape.at_once
        if temporary > self.refuses:
            raise RuntimeError("RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm.\nAnd much more.")
        sizes = SimpleNamespace(
            argument_size_in_bytes=100,
            temp_size_in_bytes=temporary,
            output_size_in_bytes=50,
            alias_size_in_bytes=50,
        )
        done = SimpleNamespace(memory_analysis=lambda: sizes, as_text=lambda: "")
        return SimpleNamespace(compile=lambda: done)


def compiler(program, memory):
    return _Compiler(program, memory, lambda line: None)


def test_the_most_common_the_longest_and_the_fullest_shape_are_compiled():
    steps, ours = counted(16, shards=2, tokens=13000), compiler(Pretended(), 15000)
    counts = _an_epoch(steps.grid)
    found = ours.compile(counts)
    assert [(one.name, one.shape.sequences, one.shape.tokens) for one in found] == [
        ("most common", 8, 1024),
        ("longest", 2, 5120),
        ("fullest", 8, 1536),
    ]
    assert sum(one.steps[0] for one in found) <= found[0].steps[1] == counts.total()
    assert all(one.fits for one in found)


@pytest.mark.parametrize("refuses", [float("inf"), 30000])
def test_what_does_not_fit_gets_the_limit_that_would(refuses):
    """16 rows of 5,120 tokens are 81,920 at once, and 30,100 bytes are there."""
    program = Pretended(refuses)
    steps, ours = counted(16, shards=2), compiler(program, 30100)
    found = ours.compile(_an_epoch(steps.grid))
    assert {one.name: one.fits for one in found} == {"most common": True, "longest": False}
    assert "DOES NOT FIT" in found[1].line()
    assert ("RESOURCE_EXHAUSTED: Used 20.00G of 15.75G hbm." in found[1].line()) == (refuses < 81920)
    limit = ours.find_limit(steps, found)
    assert 20000 < limit <= 30000
    limited = counted(16, shards=2, tokens=limit)
    assert all(shape.at_once <= 30000 for shape in _an_epoch(limited.grid))
    assert len(set(program.compiled)) == len(program.compiled)


def test_no_limit_helps_where_a_row_a_device_is_too_much():
    steps, ours = counted(16, shards=8), compiler(Pretended(), 30100)
    found = ours.compile(_an_epoch(steps.grid))
    assert ours.find_limit(steps, found) is None


def test_chips_by_the_names_that_jax_gives_them():
    assert find_chip("TPU v5 lite").name == "TPU v5 lite"
    assert find_chip("TPU v5").name == "TPU v5"
    assert find_chip("TPU v5p").name == "TPU v5"
    assert find_chip("TPU v5e").name == "TPU v5 lite"
    assert find_chip("TPU v6e").name == "TPU v6 lite"
    assert find_chip("NVIDIA H100 80GB HBM3").name == "H100"
    assert find_chip("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    assert find_chip("NVIDIA L4").name == "L4"
    assert find_chip("NVIDIA L40S") is find_chip("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    assert find_chip("cpu") is None
    assert find_gpu("h200").chip.name == "H200"
    assert find_gpu("rtx3090").chip.name == "RTX 3090"
    assert find_gpu("v5e") is None


def silkie_compile(*arguments: object) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "silkie_jax.cli", "compile", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_a_dry_run_on_pretended_devices(tmp_path):
    make_tiny(tmp_path / "model")
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {tmp_path / 'model'}\ncorpus: none\nrun_dir: none\nlora: {{rank: 4}}\nbatch_rows: 4\n")
    done = silkie_compile(config, "--topology", "cpu:4", "--tokens", 640, "--json", "mesh.fsdp=2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["chips"], found["rows"], found["fits"]) == (4, 4, True)
    assert found["flops"] > 0
    (program,) = found["compiled"]
    assert (program["shape"]["sequences"], program["shape"]["tokens"]) == (4, 640)
    assert program["collectives"]["all-gather"] > 0


def test_the_corpus_own_rows_are_what_is_compiled(tmp_path):
    make_tiny(tmp_path / "model")
    records = [record(n, images=0, words=40 if n == 5 else 0) for n in range(12)]
    write_corpus(tmp_path / "corpus", records)
    given = {"model": str(tmp_path / "model"), "corpus": str(tmp_path / "corpus"), "run_dir": "none"}
    given |= {"lora": {"rank": 2}, "batch_rows": 4, "batch_tokens": 1000, "evaluation_fraction": 0, "remat": "none"}
    found = forecast(make_config(given | {"mesh": {"data": 1}}), "cpu:1", say=lambda line: None)
    assert found.lengths == f"rows of {tmp_path / 'corpus'}"
    assert found.in_all == 12
    shapes = {one.name: one.shape for one in found.compiled}
    assert (shapes["most common"].batches, shapes["most common"].sequences, shapes["most common"].tokens) == (1, 4, 192)
    assert shapes["longest"].tokens > 600
    assert shapes["longest"].at_once <= 1000
    assert shapes["longest"].batches == 4
    assert found.lines(1)[2].startswith("most common, 2 of 3 steps: 1 x 4 rows of 192 tokens: ")
    assert (tmp_path / "corpus" / "rows").is_dir()


def test_new_choices_of_a_run_are_forecast(tmp_path):
    """sft of all responses, with rates of their own; and DPO with a likelihood term."""
    make_tiny(tmp_path / "model")
    write_corpus(tmp_path / "corpus", [record(n, images=0) for n in range(6)])
    given = {"model": str(tmp_path / "model"), "corpus": str(tmp_path / "corpus"), "run_dir": "none"}
    given |= {"lora": {"rank": 2}, "batch_rows": 4, "evaluation_fraction": 0, "remat": "none", "mesh": {"data": 1}}
    rates = {"vision_learning_rate": 1e-6, "resampler_learning_rate": 1e-5}
    sft = given | {"objective": "sft", "imitate": "all", "train_vision": "all", "optimizer": rates}
    found = forecast(make_config(sft), "cpu:1", say=lambda line: None)
    assert (found.in_all, found.pairs_each, found.responses_each) == (6, 0, 4)
    assert found.fits
    found = forecast(make_config(given | {"sft_weight": 1.0}), "cpu:1", say=lambda line: None)
    assert found.pairs_each == 6
    told = dataclasses.replace(found, seconds={"compute": 2.0}, instructions=4.0)
    assert "2.0 instructions/s, 12 pairs/s" in "\n".join(told.lines(1))
    told = dataclasses.replace(told, pairs_each=0, responses_each=4.0)
    assert "2.0 instructions/s, 8 responses/s" in "\n".join(told.lines(1))


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
    assert found["rows"] >= 64
    for program in found["compiled"]:
        assert program["memory_bytes"] == 16 * 2**30
        assert program["argument_bytes"] * found["chips"] > 19e9  # 9.66 billion parameters


@pytest.mark.slow
def test_the_recipe_fits_one_gpu_of_80_gb_at_full_size():
    """By XLA's real compiler for Hopper, with the one-pass kernel as Triton compiles it."""
    pytest.importorskip("jax_cuda12_plugin", reason="XLA's compiler for GPUs is not installed (the cuda12 extra)")
    done = silkie_compile(CONFIGS / "silkie-1x80gb.yaml", "--topology", "h100:1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"]
    for program in found["compiled"]:
        assert 19e9 < program["argument_bytes"] < program["peak_bytes"] < 72e9


@pytest.mark.slow
def test_what_would_fit_one_gpu_of_80_gb_is_said_at_full_size():
    pytest.importorskip("jax_cuda12_plugin", reason="XLA's compiler for GPUs is not installed (the cuda12 extra)")
    done = silkie_compile(CONFIGS / "silkie-1x80gb.yaml", "--topology", "h100:1", "--json", "batch_tokens=null")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert {one["name"]: one["fits"] for one in found["compiled"]} == {"most common": True, "longest": False}
    assert 8192 < found["batch_tokens"] < 2**15
