"""Benchmarks run, at their smallest.

Those of convert.py and peer_torch.py are in tests/checkpoints/test_convert.py and test_peer_torch.py; pods.py needs the
compilers of TPUs and GPUs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import attention, data_prep, generate, gpu, input, judge_client, layout, logprobs, step
from silkie_jax.errors import UserError
from tests.benchmarks.conftest import cells

SIZE = ["--size", "tiny", "--turns", "1"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_layout(run):
    printed = run(layout, *SIZE, "--instructions", "1")
    assert cells(printed, "separate")[2] == "5.16"  # five pairs
    assert float(cells(printed, "separate")[-1]) < 1e-5
    assert float(cells(printed, "pairs")[-1]) < 1e-5


def test_logprobs(run):
    printed = run(logprobs, *SIZE, "--labels", "128", "512", "--rows", "1")
    for head in ("frozen", "trained"):
        assert float(cells(printed, f"{head} | 512")[-2]) < 1e-5
        assert float(cells(printed, f"{head} | 512")[-1]) < 1e-5
        fused, full = ([float(cells(printed, f"{head} | {count}")[place]) for count in (128, 512)] for place in (5, 6))
        assert full[1] - full[0] > 5 * (fused[1] - fused[0])


@pytest.mark.slow(60)
def test_step(run):
    printed = run(step, *SIZE, "--steps", "1", "--warmup", "1", "--remat", "full", "dots", "--also", "accumulate=2")
    losses = [cells(printed, f"accumulate 1, remat {remat}")[-1].split(",")[0] for remat in ("full", "dots")]
    assert losses[0] == losses[1]
    assert cells(printed, "accumulate 2, remat full")[3] == "38"


@pytest.mark.slow
def test_gpu(run, tmp_path):
    run(gpu, "--size", "tiny", "--parts", "logprobs", "--out", str(tmp_path), out=False)
    assert "Head 2374 x 64" in (tmp_path / "logprobs.md").read_text()


# What a bare GPU machine lacks, beside JAX, Flax, PyTorch and what these bring.
ABSENT = ("grain", "omegaconf", "tensorflow_datasets", "array_record", "tensorboardX", "jinja2", "openai")
WITHOUT = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.slow(70)
def test_what_runs_on_a_gpu_needs_jax_and_flax_alone(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "XLA_FLAGS": ""}
    small = ["--size", "tiny", "--batch-rows", "1", "--remat", "dots", "--attention", "plain", "--steps", "1"]
    cheap = "features=precomputed,quantize=int8"
    commands = {
        "attention": ["benchmarks.attention", "--size", "tiny", "--lengths", "64", "--rows", "1", "--steps", "1"],
        "step": ["benchmarks.step", *small, "--warmup", "1", "--turns", "1", "--also", cheap],
        "logprobs": ["benchmarks.gpu", "--size", "tiny", "--parts", "logprobs", "--out", str(tmp_path)],
        "peers": ["benchmarks.peer_torch", "--help"],
    }
    for name, command in commands.items():
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
        assert "Error" not in done.stdout, done.stdout


@pytest.mark.slow
def test_generate(run):
    printed = run(generate, *SIZE, "--requests", "2", "--images", "1", "--slots", "2", "--sides", "one-by-one")
    assert cells(printed, "engine")[-2] == "1.00"
    assert all(float(cell) > 0 for cell in cells(printed, "one-by-one")[1:])
    assert "two questions an image" in printed


@pytest.mark.slow
def test_attention(run):
    printed = run(attention, "--lengths", "64", "--rows", "1", "--steps", "1")
    assert float(cells(printed, "rows of 64 tokens | plain")[4]) > 0
    assert "would be interpreted here" in printed


@pytest.mark.slow
def test_input(run):
    printed = run(input, "--rows", "16", "--side", "28", "--width", "64", "--turns", "1")
    assert "ratio, pipeline / Pillow" in printed
    assert "a row's features: 0.03 MB" in printed


@pytest.mark.slow
def test_data_prep(run):
    assert run(data_prep, "speed", "--records", "20", "--rounds", "1", out=False)


@pytest.mark.slow
def test_judge_client(run):
    assert run(judge_client, "--requests", "8", "--concurrency", "4", "--rounds", "1", out=False)


def test_an_unknown_key_is_refused(run):
    with pytest.raises(UserError, match="write KEY=VALUE"):
        run(step, *SIZE, "--also", "remt=none", out=False)


def test_what_a_variant_refuses_stands_in_its_line(run):
    printed = run(step, *SIZE, "--remat", "full", "--tokens", "64", out=False)
    assert cells(printed, "ours")[1] == "error: --tokens 64: a row has 930"
