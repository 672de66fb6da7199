"""The vision tower and the resampler, stage by stage."""

import jax
import numpy as np
import pytest
from flax import nnx

from silkie_jax.models.qwen_vl.vision import interpolate_positions, patches
from tests.pairs import layer
from tests.reference.qwen_vl import interpolate

TOLERANCE = 5e-5
STAGES = ["conv1", "plus_pos", "ln_pre", "block0", "block1", "block2", "attn_pool", "ln_post", "out"]


@nnx.jit
def stages(model, images):
    """The tower taken apart, each stage under golden's name."""
    visual, out = model.visual, {}
    out["pixels"] = patches(images, model.config.visual.patch_size)
    out["conv1"] = visual.conv1(out["pixels"])
    positions = interpolate_positions(visual.positional_embedding[...], out["conv1"].shape[1])
    out["plus_pos"] = out["conv1"] + positions
    x = out["ln_pre"] = visual.ln_pre(out["plus_pos"])
    for i in range(model.config.visual.layers):
        block = layer(visual.layers, i)
        out[f"block{i}_attn"] = block.attn(block.ln_1(x))
        x = out[f"block{i}"] = block(x)
    out["attn_pool"] = visual.attn_pool(x)
    out["ln_post"] = visual.ln_post(out["attn_pool"])
    out["out"] = model.encode_images(images)  # the way it is used: layers scanned
    out["out_nested"] = model.encode_images(images[:, None])
    return jax.tree.map(jax.numpy.asarray, out)


@pytest.fixture(scope="module")
def golden_stages(reference_data, golden_model):
    return stages(golden_model, reference_data.resized)


@pytest.fixture(scope="module")
def tiny_stages(pair):
    images = pair.pixels(3)
    return stages(pair.model, images), pair.oracle.vision(images)


def test_golden_pixels(reference_data, golden_stages):
    expected = reference_data["vision/pixel_values"]  # [N, 3, S, S]
    n, _, side, _ = expected.shape
    cut = expected.reshape(n, 3, side // 14, 14, side // 14, 14).transpose(0, 2, 4, 1, 3, 5)
    ours = golden_stages["pixels"][:n]
    np.testing.assert_allclose(ours, cut.reshape(ours.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_golden_stage(reference_data, golden_stages, stage):
    expected = reference_data[f"vision/{stage}"]
    np.testing.assert_allclose(golden_stages[stage][: len(expected)], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("block", range(3))
def test_golden_attention(reference_data, golden_stages, block):
    ours = golden_stages[f"block{block}_attn"][1:2, :: 8 if block else 1]  # golden keeps the second image, thinned out
    np.testing.assert_allclose(ours, reference_data[f"vision/block{block}_attn"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("side", [4, 8, 12, 16, 20, 24, 32])
def test_golden_positions(reference_data, golden_model, side):
    table = golden_model.visual.positional_embedding[...][:, :16]
    ours = interpolate_positions(table, side**2)
    np.testing.assert_allclose(ours, reference_data[f"posemb/to_{side}x{side}"], rtol=0, atol=1e-6)


def test_golden_positions_of_the_resampler(reference_data, golden_model):
    ours = interpolate_positions(golden_model.visual.attn_pool.pos_embed[...], 20 * 20)
    np.testing.assert_allclose(ours[::5], reference_data["posemb/attn_pool_interp"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "stage", ["conv1", "plus_pos", "ln_pre", "block0_attn", "block1", "attn_pool", "ln_post", "out"]
)
def test_stage_equals_the_oracle(tiny_stages, stage):
    ours, oracle = tiny_stages
    np.testing.assert_allclose(ours[stage], oracle[stage], rtol=0, atol=TOLERANCE)


def test_leading_dimensions_of_images_are_kept(tiny_stages):
    ours, _ = tiny_stages
    assert ours["out_nested"].shape == (3, 1, 256, 128)
    np.testing.assert_array_equal(ours["out_nested"][:, 0], ours["out"])


@pytest.mark.parametrize("side", [1, 3, 5, 16, 17, 32, 64])
def test_positions_equal_the_oracle(side):
    table = np.random.default_rng(side).standard_normal((256, 8)).astype(np.float32)
    np.testing.assert_allclose(interpolate_positions(table, side**2), interpolate(table, side), rtol=0, atol=2e-6)


def test_the_same_grid_is_left_alone():
    table = np.random.default_rng(0).standard_normal((256, 8)).astype(np.float32)
    assert interpolate_positions(table, 256) is table
