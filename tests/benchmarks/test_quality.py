"""The cost of 8 bits in quality, measured at its smallest: a finished quickstart is a model and a corpus."""

import math

import pytest

from benchmarks import quality
from silkie_jax.errors import UserError
from tests.benchmarks.conftest import cells
from tests.training.support import make_tiny, record, write_corpus


def test_what_is_no_quickstart_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="has no folder sft; make one with"):
        run(quality, str(tmp_path), out=False)


@pytest.mark.slow
def test_quality(run, tmp_path):
    make_tiny(tmp_path / "sft")
    write_corpus(tmp_path / "corpus", [record(n, images=n % 2) for n in range(6)])
    printed = run(quality, str(tmp_path), "--steps", "2", "--seeds", "1", "--held-out", "0.4")
    before, after = printed.split("Margins of reward")
    # x bfloat16 of a pair's difference: its own is 1, and 8-bit products are the coarsest.
    usual, eight, fp8 = (float(cells(before, name)[-1]) for name in ("bfloat16", "int8", "fp8"))
    assert usual == 1
    assert max(usual, eight) < fp8
    for name in quality.NUMERICS:
        first, margin, *_, off, _ = cells(after, name)[1:]
        # Policy and reference are one program in fp8 alone; elsewhere they are two, which may round apart.
        assert float(first) <= (0 if name == "fp8" else 0.02)
        assert math.isfinite(float(margin.split()[0]))
        assert (float(off) == 0) == (name == "float32")
