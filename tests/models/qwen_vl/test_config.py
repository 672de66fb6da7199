"""config.json: read, checked, written back."""

import json

import pytest

from examples.tiny_qwen_vl import make_config
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.config import QWEN_VL_CHAT, QwenVLConfig

FIELDS = make_config(512)


def changed(changes):
    """The fields with `changes`, whose keys may start with `visual.`; None removes a field."""
    fields = json.loads(json.dumps(FIELDS))
    for key, value in changes.items():
        section = fields["visual"] if key.startswith("visual.") else fields
        section[key.removeprefix("visual.")] = value
        if value is None:
            del section[key.removeprefix("visual.")]
    return fields


def test_every_field_is_written_back():
    fields = changed({"a_field_of_tomorrow": [1, {"x": None}], "visual.another": "y", "rotary_emb_base": 10000})
    written = QwenVLConfig.from_dict(fields).to_dict()
    assert json.dumps(written, sort_keys=True) == json.dumps(fields, sort_keys=True)


def test_golden_is_written_back(golden):
    fields = json.loads((golden / "tiny-qwen-vl" / "config.json").read_text())
    assert QwenVLConfig.from_folder(golden / "tiny-qwen-vl").to_dict() == fields


def test_a_config_made_in_code_is_read_back():
    again = QwenVLConfig.from_dict(QWEN_VL_CHAT.to_dict())
    assert again.to_dict() == QWEN_VL_CHAT.to_dict()
    assert (again.end_of_text, again.image_start, again.image_end) == (151643, 151857, 151858)
    assert (again.mlp_width, again.visual.mlp_width, again.visual.grid) == (11008, 8192, 32)
    assert (again.visual.head_dim, again.visual.pool_heads, again.attention_width) == (104, 32, 4096)


def test_configs_of_equal_files_are_equal():
    """jit compares them: two loads of one checkpoint must not compile twice."""
    assert QwenVLConfig.from_dict(FIELDS) == QwenVLConfig.from_dict(changed({}))
    assert hash(QwenVLConfig.from_dict(FIELDS)) == hash(QwenVLConfig.from_dict(changed({})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual": None}, "no 'visual' section; is this a Qwen-VL checkpoint"),
        ({"visual": []}, "no 'visual' section"),
        (
            {"hidden_size": None, "visual.width": None, "seq_length": None},
            "missing visual.width, hidden_size, seq_length",
        ),
        ({"no_bias": False}, "no_bias = False is not Qwen-VL"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rotary_pct": 0.5}, "rotary_pct"),
        ({"hidden_size": "256", "use_logn_attn": 1}, "not hidden_size = '256', use_logn_attn = 1"),
        ({"num_hidden_layers": 0}, "not num_hidden_layers = 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True"),
        ({"visual.mlp_ratio": float("nan")}, "visual.mlp_ratio = nan"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon = 0"),
        ({"kv_channels": 16}, "kv_channels x num_attention_heads must equal hidden_size"),
        ({"kv_channels": 1, "num_attention_heads": 256}, "kv_channels must be even"),
        ({"intermediate_size": 385}, "intermediate_size must be even"),
        ({"seq_length": 1}, "seq_length must be at least 2"),
        ({"visual.output_dim": 128}, "visual.output_dim must equal hidden_size"),
        ({"visual.image_size": 57}, "visual.image_size must be divisible by visual.patch_size"),
        ({"visual.heads": 7}, "visual.width must be divisible by visual.heads"),
        ({"visual.image_start_id": 213}, "visual.image_start_id must be at least 214"),
        ({"vocab_size": 728}, r"vocab_size must exceed visual.image_start_id \+ 2"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as error:
        QwenVLConfig.from_dict(changed(changes), where="folder/config.json")
    assert str(error.value).startswith("folder/config.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"visual": {}}', "missing visual.image_size"),
    ],
)
def test_unreadable_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        QwenVLConfig.from_folder(tmp_path)
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)
