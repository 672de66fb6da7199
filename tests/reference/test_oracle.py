"""The NumPy model against the arrays of the official PyTorch code."""

import numpy as np
import pytest

from tests.reference.golden import LANGUAGE_CASES, Golden
from tests.reference.objective import log_softmax
from tests.reference.qwen_vl import QwenVL, interpolate, load_adapter, load_checkpoint, merge

VISION = 5e-5
STAGES = ["conv1", "plus_pos", "ln_pre", "attn_pool", "ln_post", "out", "block0", "block1", "block2"]


def logit_tolerance(length: int) -> float:
    return 5e-4 if length > 600 else 2e-4


@pytest.fixture(scope="module")
def data(golden):
    return Golden(golden)


@pytest.fixture(scope="module")
def model(data):
    return QwenVL(*load_checkpoint(data.checkpoint))


@pytest.fixture(scope="module")
def stages(data, model):
    return model.vision(data.resized)


@pytest.fixture(scope="module")
def features(data, stages):
    """Tokens -> features of the images they name, each encoded once for all tests."""

    def look_up(tokens):
        indices = data.image_indices(tokens)
        return stages["out"][indices] if indices else None

    return look_up


# Vision


def test_pixels(data, stages):
    np.testing.assert_allclose(stages["pixel_values"][:2], data["vision/pixel_values"], atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_vision_stage(data, stages, stage):
    expected = data[f"vision/{stage}"]
    np.testing.assert_allclose(stages[stage][: len(expected)], expected, rtol=0, atol=VISION)


@pytest.mark.parametrize("block", range(3))
def test_vision_attention(data, stages, block):
    ours = stages[f"block{block}_attn"][1:2, :: 8 if block else 1]  # golden keeps the second image, thinned out
    np.testing.assert_allclose(ours, data[f"vision/block{block}_attn"], rtol=0, atol=VISION)


@pytest.mark.parametrize("side", [4, 8, 12, 16, 20, 24, 32])
def test_positions_are_brought_to_the_grid(data, model, side):
    table = model.tensors["transformer.visual.positional_embedding"][:, :16]
    np.testing.assert_allclose(interpolate(table, side), data[f"posemb/to_{side}x{side}"], rtol=0, atol=1e-6)


def test_positions_of_the_resampler(data, model):
    table = interpolate(model.tensors["transformer.visual.attn_pool.pos_embed"], 20)
    np.testing.assert_allclose(table[::5], data["posemb/attn_pool_interp"], rtol=0, atol=2e-6)


# Language


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", LANGUAGE_CASES)
def test_language(data, model, features, case, mode):
    # Golden leaves the training arrays out where they equal those of evaluation: up to seq_length tokens.
    prefix = f"{case}/{mode}" if f"{case}/{mode}_logits" in data else f"{case}/eval"
    tokens, valid = data[f"{case}/input_ids"], data[f"{case}/attention_mask"] == 1
    states = model.hidden_states(tokens, mask=valid, train=mode == "train", features=features(tokens))
    logits = model.linear("lm_head", states[-1])
    tolerance = logit_tolerance(tokens.shape[1])

    positions = data[f"{prefix}_logits_pos"]
    np.testing.assert_allclose(
        logits[:, positions][valid[:, positions]],
        data[f"{prefix}_logits"][valid[:, positions]],
        rtol=0,
        atol=tolerance,
    )
    logps = log_softmax(logits)
    logsumexp = (logits - logps)[..., 0]
    np.testing.assert_allclose(logsumexp[valid], data[f"{prefix}_logsumexp"][valid], rtol=0, atol=tolerance)
    next_logp = np.take_along_axis(logps[:, :-1], tokens[:, 1:, None].astype(int), axis=-1)[..., 0]
    both = valid[:, 1:] & valid[:, :-1]
    np.testing.assert_allclose(next_logp[both], data[f"{prefix}_next_token_logp"][both], rtol=0, atol=tolerance)
    best = np.sort(logits, axis=-1)
    margin = data[f"{prefix}_top1_margin"]
    np.testing.assert_allclose((best[..., -1] - best[..., -2])[valid], margin[valid], rtol=0, atol=2 * tolerance)
    clear = valid & (margin > 1e-3)
    np.testing.assert_array_equal(logits.argmax(axis=-1)[clear], data[f"{prefix}_argmax"][clear])

    if f"{prefix}_hidden_0" in data:
        for state, name in zip(states, ["hidden_0", "hidden_1", "hidden_final_after_ln_f"], strict=True):
            np.testing.assert_allclose(state[:, ::4], data[f"{prefix}_{name}"], rtol=0, atol=VISION)


def test_image_rows_are_replaced(data, model):
    """What stands between <img> and </img> does not matter: paths as bytes or 256 <imgpad>."""
    tokens = data["one_image/input_ids"]
    start = int(np.argwhere(tokens[0] == model.image_start)[0, 0])
    padded = tokens.copy()
    padded[0, start + 1 : start + 257] = model.image_start + 2
    np.testing.assert_array_equal(
        model.hidden_states(tokens, data.images(tokens))[-1], model.hidden_states(padded, data.images(tokens))[-1]
    )


# Generation


@pytest.mark.parametrize(
    "case", ["text", "image", "crossing_seq_length", "prompt_beyond_seq_length", "left_padded_batch"]
)
def test_greedy(data, model, case):
    expected = data.json("generation")["generate"][case]
    tokens = np.array(expected["prompt_ids"])
    ids, logits = model.greedy(
        tokens, data.images(tokens), expected["kw"]["max_new_tokens"], mask=expected["attention_mask"]
    )
    np.testing.assert_array_equal(ids, expected["new_ids"])
    best = np.sort(logits, axis=-1)
    tolerance = logit_tolerance(tokens.shape[1])
    np.testing.assert_allclose(best[..., -1], expected["top1"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(best[..., -1] - best[..., -2], expected["margin"], rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("case", ["text", "image", "two_images_history", "system", "text_custom_stop"])
def test_chat(data, model, case):
    """The official chat method stops at <|im_start|>, <|im_end|> and the caller's words, then writes <|endoftext|>."""
    expected = data.json("generation")["chat"][case]
    tokens, new = np.array([expected["prompt_ids"]]), expected["new_ids"]
    words = [word for (word,) in expected.get("stop_words_ids_argument") or []]
    stop = [model.end_of_text + 1, model.end_of_text + 2, *words]
    ids, _ = model.greedy(tokens, data.images(tokens), expected["max_new_tokens"], stop=stop)
    rest = [model.end_of_text] * (expected["max_new_tokens"] - len(new))
    assert ids[0].tolist() == new + rest


# LoRA


@pytest.mark.parametrize("case", ["text_short", "one_image", "long_alpha3_image"])
def test_lora(data, model, features, case):
    adapter = load_adapter(data.adapter)
    adapted = QwenVL(model.tensors, model.config, adapter)
    merged = QwenVL(merge(model.tensors, adapter), model.config)
    tokens, tolerance = data[f"{case}/input_ids"], logit_tolerance(data[f"{case}/input_ids"].shape[1])
    positions = data.lora[f"{case}/adapter_eval_logits_pos"]
    logits = adapted(tokens, features=features(tokens))
    np.testing.assert_allclose(logits[:, positions], data.lora[f"{case}/adapter_eval_logits"], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(logits.argmax(axis=-1), data.lora[f"{case}/adapter_eval_argmax"])
    logps = log_softmax(logits)
    next_logp = np.take_along_axis(logps[:, :-1], tokens[:, 1:, None].astype(int), axis=-1)[..., 0]
    np.testing.assert_allclose(next_logp, data.lora[f"{case}/adapter_eval_next_token_logp"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(
        (logits - logps)[..., 0], data.lora[f"{case}/adapter_eval_logsumexp"], rtol=0, atol=tolerance
    )
    logits = merged(tokens, features=features(tokens))[:, positions]
    np.testing.assert_allclose(logits, data.lora[f"{case}/merged_eval_logits"], rtol=0, atol=tolerance)


def test_merged_weight(data, model):
    name = "transformer.h.0.attn.c_proj.weight"
    merged = merge(model.tensors, load_adapter(data.adapter))
    np.testing.assert_allclose(merged[name], data.lora[f"merged/{name}"], rtol=0, atol=1e-7)
    changed = [name for name in merged if merged[name] is not model.tensors[name]]
    assert sorted(changed) == [f"{module}.weight" for module in sorted(data.json("lora")["matched_modules"])]
