"""The one-pass kernel, interpreted on the CPU, against the plain path: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from silkie_jax.nn.attention import PADDING, PLAIN, Kernel

FLASH = Kernel("flash", "interpret")


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


def both(attend_of, branches, q, k, v, weight):
    """(value, gradients) of each kernel; what padding gets does not count."""
    seen = jnp.ones(q.shape[:2], bool) if branches is None else branches != PADDING

    def outcome(kernel: Kernel):
        def loss(q, k, v):
            out = jnp.where(seen[..., None, None], attend_of(kernel)(q, k, v), 0)
            return (out * weight).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
        return out, *gradients

    return zip(outcome(FLASH), outcome(PLAIN), strict=True)


ROWS = {
    "one sequence": [[0] * 70],
    "a prompt and branches": [[0] * 40 + [1] * 30 + [2] * 45 + [3] * 5],
    "padding on either side": [[PADDING] * 9 + [0] * 50 + [1] * 41, [0] * 20 + [1] * 30 + [PADDING] * 50],
    "packed rows": [[0] * 30 + [1] * 20 + [2] * 20 + [64] * 25 + [65] * 20 + [128] * 10 + [129] * 15 + [PADDING] * 3],
    "nothing but padding": [[PADDING] * 64, [0] * 64],
    "a token": [[0]],
}


@pytest.mark.parametrize("row", ROWS)
def test_rows_get_values_and_gradients_of_the_plain_path(row):
    branches = jnp.asarray(ROWS[row])
    shape = (*branches.shape, 3, 24)
    for ours, plain in both(lambda kernel: kernel.among(branches), branches, *arrays(0, *[shape] * 4)):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)


def test_smaller_blocks_give_the_same():
    branches = jnp.asarray(ROWS["a prompt and branches"])
    q, k, v = arrays(0, *[(*branches.shape, 1, 16)] * 3)
    ours = Kernel("flash", "interpret", most=(32, 16)).among(branches)(q, k, v)
    np.testing.assert_allclose(ours, FLASH.among(branches)(q, k, v), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("queries", "keys", "width"), [(256, 256, 104), (64, 100, 16), (5, 130, 8)])
def test_images_see_everything(queries, keys, width):
    """The tower's heads are 104 wide; the resampler has fewer queries than keys."""
    q, k, v, weight = arrays(1, *[(2, n, 2, width) for n in (queries, keys, keys, queries)])
    for ours, plain in both(lambda kernel: kernel.everywhere, None, q, k, v, weight):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)


def test_bfloat16_is_as_close_as_its_rounding():
    branches = jnp.asarray([[0] * 60 + [1] * 40])
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(2, *[(1, 100, 2, 32)] * 3))
    ours, plain = (kernel.among(branches)(q, k, v) for kernel in (FLASH, PLAIN))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(plain, np.float32), rtol=0, atol=0.02)


def test_scores_of_any_size_do_not_overflow():
    branches = jnp.asarray([[0] * 40 + [1] * 30])
    q, k, v = arrays(3, *[(1, 70, 1, 16)] * 3)
    ours = FLASH.among(branches)(1e4 * q, k, v)
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, PLAIN.among(branches)(1e4 * q, k, v), rtol=0, atol=1e-4)
