"""The checkpoint of examples/tiny_qwen_vl.py, and the oracle on it: these tests need no reference data."""

import base64
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import examples
from examples.tiny_qwen_vl import make_checkpoint, make_config, random_tensors, sine_table
from tests.reference import qwen_vl
from tests.reference.objective import branch_logps, branch_row, summed_logps
from tests.reference.qwen_vl import QwenVL, load_checkpoint

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return QwenVL(*load_checkpoint(folder))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)


def prompt(model, images=0, words=12, seed=0):
    """Ids of a prompt with that many images."""
    ids = np.random.default_rng(seed).integers(0, model.end_of_text, words).tolist()
    for i in range(images):
        ids[2 + i : 2 + i] = [model.image_start, *[model.image_start + 2] * 256, model.image_start + 1]
    return ids


# The folder


def test_same_arguments_give_the_same_bytes(folder, tmp_path):
    again = make_checkpoint(tmp_path / "again")
    other = make_checkpoint(tmp_path / "other", seed=1)
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert any((folder / name).read_bytes() != (other / name).read_bytes() for name in files)


def test_index_and_shards_agree(tmp_path):
    folder = make_checkpoint(tmp_path, shards=3, dtype="bfloat16")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = {}
    for file in sorted(set(index["weight_map"].values())):
        blob = (folder / file).read_bytes()
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        header.pop("__metadata__")
        assert {entry["dtype"] for entry in header.values()} == {"BF16"}
        assert sorted(header) == [name for name, at in index["weight_map"].items() if at == file]
        sizes[file] = sum(end - start for start, end in (entry["data_offsets"] for entry in header.values()))
    assert len(sizes) == 3
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert max(sizes.values()) < 2 * min(sizes.values())


def test_pytorch_form_holds_the_same(folder, tmp_path):
    torch = pytest.importorskip("torch", reason="writing pytorch_model-*.bin needs torch")
    make_checkpoint(tmp_path, safetensors=False)
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    tensors = {}
    for file in files:
        tensors |= torch.load(tmp_path / file, weights_only=True)
    expected, _ = load_checkpoint(folder)
    assert tensors.keys() == expected.keys() == index["weight_map"].keys()
    assert all((tensors[name].numpy() == expected[name]).all() for name in expected)


def test_command_line(tmp_path):
    script = Path(examples.__file__).with_name("tiny_qwen_vl.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path / "deep" / "tiny", "--layers", "1", "--image-size", "28"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("wrote ")
    _, config = load_checkpoint(tmp_path / "deep" / "tiny")
    assert (config["num_hidden_layers"], config["visual"]["image_size"]) == (1, 28)


def test_tensors_are_those_of_the_official_checkpoint(golden):
    """Same names and shapes as the tiny checkpoint that the official code wrote, for its config."""
    tensors, config = load_checkpoint(golden / "tiny-qwen-vl")
    ours = random_tensors(config)
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in tensors.items()}
    default = make_config(512)
    assert default.keys() == config.keys()
    assert default["visual"].keys() == config["visual"].keys()


def test_full_size_names(golden):
    expected = json.loads((golden / "full_size_tensor_shapes.json").read_text())
    config = json.loads((golden / "tiny-qwen-vl" / "config.json").read_text())
    config |= {"num_hidden_layers": 32, "visual": config["visual"] | {"layers": 48}}
    assert sorted(random_tensors(config)) == sorted(expected)


def test_bpe_is_valid(folder):
    """Every token is what its bytes encode to, with the official pattern and with merges by rank."""
    lines = (folder / "qwen.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    assert list(ranks.values()) == list(range(512))
    encoding = tiktoken.Encoding("tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert all(encoding.encode_single_token(token) == rank for token, rank in ranks.items())
    texts = [token.decode() for token in ranks if len(token) > 1 and _is_text(token)]
    assert len(texts) > 200
    assert all(len(encoding.encode(text)) == 1 for text in texts)
    text = "Is there a clock on the wall? 这张图片里有什么？ né ✓\n"
    ids = encoding.encode(text)
    assert encoding.decode(ids) == text
    assert len(ids) < len(text.encode()) / 1.5


def _is_text(token):
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_ids_follow_the_official_layout(folder, model):
    config = model.config
    assert config["visual"]["image_start_id"] == 512 + 214
    assert config["vocab_size"] == 768  # 512 + 217 specials, padded to a multiple of 128
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["pad_token_id"] == model.end_of_text == 512


# Mistakes in a port must show on these weights: each of these moves the logits well beyond the tolerance


def _tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _interleaved_rotary(x, positions, base, rotate=qwen_vl.rotate):
    order = [*range(0, x.shape[-1], 2), *range(1, x.shape[-1], 2)]
    return rotate(x[..., order], positions, base)[..., np.argsort(order)]


MISTAKES = {
    "tanh gelu": ("gelu", _tanh_gelu),
    "bicubic a": ("bicubic_matrix", functools.partial(qwen_vl.bicubic_matrix, a=-0.5)),
    "vision epsilon": ("VISION_EPSILON", 1e-5),
    "interleaved rotary": ("rotate", _interleaved_rotary),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(model, images, monkeypatch, mistake):
    tokens = np.array([prompt(model, images=1)])
    right = model(tokens, images[:1])
    monkeypatch.setattr(qwen_vl, *MISTAKES[mistake])
    assert abs(model(tokens, images[:1]) - right).max() > 2e-4


@pytest.mark.parametrize("change", ["pos_embed", "rms epsilon", "in_proj layout", "w1 and w2"])
def test_a_wrong_weight_shows(model, images, change):
    tensors, config = dict(model.tensors), dict(model.config)
    if change == "pos_embed":
        tensors["transformer.visual.attn_pool.pos_embed"] = sine_table(256)
    elif change == "rms epsilon":
        config["layer_norm_epsilon"] = 1e-5
    elif change == "in_proj layout":
        name = "transformer.visual.transformer.resblocks.0.attn.in_proj.weight"
        blocks = tensors[name].reshape(3, config["visual"]["heads"], -1, tensors[name].shape[1])
        tensors[name] = blocks.swapaxes(0, 1).reshape(tensors[name].shape)
    else:
        one, two = (f"transformer.h.0.mlp.w{i}.weight" for i in (1, 2))
        tensors[one], tensors[two] = tensors[two], tensors[one]
    tokens = np.array([prompt(model, images=1)])
    right = model(tokens, images[:1])
    assert abs(QwenVL(tensors, config)(tokens, images[:1]) - right).max() > 2e-4


# Rows of several branches


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("branches", [1, 2, 3, 4])
def test_row_equals_separate_sequences(model, images, branches, with_image):
    rng = np.random.default_rng(branches)
    start = prompt(model, images=int(with_image))
    pixels = images[:1] if with_image else None
    responses = [rng.integers(0, model.end_of_text, rng.integers(1, 20)).tolist() for _ in range(branches)]
    labelled = [(rng.random(len(response)) < 0.8).tolist() for response in responses]
    row = branch_row(start, responses, labelled, length=len(start) + 90)
    logits = model(row["tokens"], pixels, train=True, positions=row["positions"], branches=row["branches"])
    together = branch_logps(logits, row, branches)[0]
    for k, (response, counts) in enumerate(zip(responses, labelled, strict=True)):
        tokens = np.array([start + response])
        labels = np.array([[-100] * len(start) + [t if c else -100 for t, c in zip(response, counts, strict=True)]])
        alone = summed_logps(model(tokens, pixels, train=True), labels)
        np.testing.assert_allclose(together[k], alone[0], rtol=1e-12, atol=1e-12)


def test_branches_do_not_see_each_other(model):
    start = prompt(model)

    def logps(first):
        row = branch_row(start, [first, [5, 6, 7]])
        logits = model(row["tokens"], train=True, positions=row["positions"], branches=row["branches"])
        return branch_logps(logits, row, 2)[0]

    one, other = logps([1, 2]), logps([3, 4])
    assert one[0] != other[0]
    assert one[1] == other[1]


# Masks, images, generation


def test_padding_on_either_side_changes_nothing(model, images):
    tokens = np.array([prompt(model, images=1)])
    pad = np.full((1, 9), model.end_of_text)
    alone = model(tokens, images[:1], train=True)
    mask = np.concatenate([np.zeros_like(pad), np.ones_like(tokens)], axis=1)
    left = model(np.concatenate([pad, tokens], axis=1), images[:1], mask, train=True)[:, 9:]
    right = model(np.concatenate([tokens, pad], axis=1), images[:1], mask[:, ::-1], train=True)[:, :-9]
    np.testing.assert_allclose(left, alone, atol=1e-10)  # rotary attention sees differences of positions only
    np.testing.assert_allclose(right, alone, atol=1e-10)


def test_images_are_taken_in_order_of_appearance(model, images):
    both = np.array([prompt(model, images=1), prompt(model, images=1)])
    together = model(both, images)
    for row in range(2):
        np.testing.assert_allclose(together[row], model(both[row : row + 1], images[row : row + 1])[0], atol=1e-10)
    assert abs(together[0] - together[1]).max() > 1e-3


def test_wrong_spans_are_refused(model, images):
    tokens = np.array([prompt(model, images=1)])
    with pytest.raises(ValueError, match="1 <img> tokens, 2 images"):
        model(tokens, images)
    with pytest.raises(ValueError, match="1 <img> tokens, 0 images"):
        model(tokens)
    with pytest.raises(ValueError, match="not closed"):
        model(tokens[:, :100], images[:1])


def test_greedy_of_a_padded_batch_is_that_of_each_row(model, images):
    rows = [prompt(model, images=1), prompt(model, words=5, seed=1)]
    alone = [model.greedy(np.array([r]), images[:1] if r is rows[0] else None, 5)[0][0] for r in rows]
    width = max(map(len, rows)) + 3
    for side in ("left", "right"):
        tokens, mask = np.full((2, width), model.end_of_text), np.zeros((2, width), int)
        for i, row in enumerate(rows):
            at = slice(width - len(row), width) if side == "left" else slice(len(row))
            tokens[i, at], mask[i, at] = row, 1
        np.testing.assert_array_equal(model.greedy(tokens, images[:1], 5, mask=mask)[0], alone)


def test_greedy_after_a_stop_is_end_of_text(model):
    tokens = np.array([prompt(model)])
    free = model.greedy(tokens, max_new_tokens=6)[0][0]
    first = free.tolist().index(free[2])
    stopped = model.greedy(tokens, max_new_tokens=6, stop=[int(free[2])])[0][0]
    assert stopped.tolist() == [*free[: first + 1], *[model.end_of_text] * (5 - first)]
