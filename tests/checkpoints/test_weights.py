"""The table of names, loading onto one or many devices, and saving a trained model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from examples.tiny_qwen_vl import make_checkpoint
from silkie_jax.checkpoints import sources
from silkie_jax.checkpoints.convert import convert
from silkie_jax.checkpoints.tensor_files import list_folder
from silkie_jax.checkpoints.weights import load_model, save_model
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.config import QWEN_VL_CHAT, QwenVLConfig
from silkie_jax.models.qwen_vl.names import leaves, official_tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "hf", shards=3)


@pytest.fixture(scope="module")
def converted(tiny):
    convert(tiny, tiny.parent / "converted", progress=False)
    return tiny.parent / "converted"


@pytest.fixture
def small_pieces(monkeypatch):
    """Cuts the tiny model's leaves into many pieces, as the large model's are."""
    monkeypatch.setattr(sources, "_PIECE", 20_000)


def arrays(model):
    return {".".join(keys): variable[...] for keys, variable in nnx.to_flat_state(nnx.state(model))}


def official(folder):
    """The checkpoint's tensors, stacked and shaped as ours by the plainest means."""
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    tree = leaves(QwenVLConfig.from_folder(folder))
    return {path: np.stack([stored[n] for n in leaf.names]).reshape(leaf.shape) for path, leaf in tree.items()}


def test_full_size_names_and_shapes_are_the_official_ones(golden):
    expected = json.loads((golden / "full_size_tensor_shapes.json").read_text())
    ours = {name: list(leaf.official) for name, leaf, _ in official_tensors(leaves(QWEN_VL_CHAT))}
    assert ours == expected
    assert list(ours) == list(expected)


def test_our_shapes_are_views_of_the_official_ones():
    tree = leaves(QWEN_VL_CHAT)
    assert sum(np.prod(leaf.shape, dtype=np.int64) for leaf in tree.values()) == 9_656_935_168
    for leaf in tree.values():
        assert np.prod(leaf.own) == np.prod(leaf.official), leaf.path
        assert leaf.own[-1] == np.prod(leaf.official[1:]) or len(leaf.official) == 1, leaf.path


def test_pieces_cover_each_leaf_once_and_are_no_larger_than_they_need_be():
    for leaf in leaves(QWEN_VL_CHAT).values():
        for dtype in (sources.BFLOAT16, np.dtype(np.float32)):
            covered = [(p.first, p.last, p.start, p.stop) for p in sources.pieces(leaf, dtype)]
            sizes = [(b - a) * (d - c) for a, b, c, d in covered]
            row = np.prod(leaf.own[1:]) * dtype.itemsize
            assert sum(sizes) == leaf.layers * leaf.own[0]
            assert len(set(covered)) == len(covered)
            assert max(sizes) == 1 or max(sizes) * row <= sources._PIECE
            assert len(covered) < 800


@pytest.mark.parametrize("form", ["tiny", "converted"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loads_every_value_from_both_forms(request, small_pieces, form, dtype):
    folder = request.getfixturevalue(form)
    model = load_model(folder, dtype)
    assert model.dtype == dtype
    expected = official(request.getfixturevalue("tiny"))
    loaded = arrays(model)
    assert loaded.keys() == expected.keys()
    for path, values in loaded.items():
        assert values.dtype == dtype
        np.testing.assert_array_equal(values, expected[path].astype(dtype), err_msg=path)


def test_parameters_may_be_kept_in_another_type_than_the_computation(tiny):
    model = load_model(tiny, "bfloat16", param_dtype="float32")
    assert model.dtype == jnp.bfloat16
    assert model.language.wte.dtype == jnp.float32


AXES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (8, 1, 1), (1, 1, 8)])
@pytest.mark.parametrize("form", ["tiny", "converted"])
def test_each_device_gets_its_slice(request, small_pieces, form, shape):
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    seen = {}

    def sharding_of(axes, shape):
        assert len(axes) == len(shape)
        named = [AXES.get(a) if n % 8 == 0 else None for a, n in zip(axes, shape, strict=True)]
        seen[shape] = axes
        return NamedSharding(mesh, PartitionSpec(*named))

    expected = official(request.getfixturevalue("tiny"))
    model = load_model(request.getfixturevalue(form), "bfloat16", sharding_of=sharding_of)
    for path, values in arrays(model).items():
        np.testing.assert_array_equal(values, expected[path].astype(jnp.bfloat16), err_msg=path)
    wte = model.language.wte[...]
    assert wte.sharding == NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    assert wte.addressable_shards[0].data.shape == (wte.shape[0] // shape[2], wte.shape[1] // shape[1])
    assert ("layers", None, "heads", "embed") in seen.values()


def test_loading_reads_each_byte_once_however_many_devices_there_are(small_pieces, monkeypatch, tiny):
    source = sources.open_source(tiny)
    read = []
    plain = type(source).read
    monkeypatch.setattr(type(source), "read", lambda self, piece: read.append(piece) or plain(self, piece))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    load_model(tiny, sharding_of=lambda axes, shape: NamedSharding(mesh, PartitionSpec()))
    assert len(set(read)) == len(read)


def test_the_default_device_is_respected(tiny):
    device = jax.devices()[3]
    with jax.default_device(device):
        model = load_model(tiny)
    assert model.language.wte[...].sharding == SingleDeviceSharding(device)


def test_a_trained_model_is_saved_and_read_back(tiny, converted, tmp_path):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    model = load_model(
        tiny, sharding_of=lambda axes, shape: NamedSharding(mesh, PartitionSpec(*(AXES.get(a) for a in axes)))
    )
    model.language.wte[...] = model.language.wte[...] + 1
    for _ in range(2):  # the second time in place of the first
        save_model(model, tmp_path / "model", like=converted)
    again = arrays(load_model(tmp_path / "model"))
    for path, values in arrays(model).items():
        np.testing.assert_array_equal(again[path], values, err_msg=path)
    assert (tmp_path / "model" / "qwen.tiktoken").read_bytes() == (tiny / "qwen.tiktoken").read_bytes()
    save_model(model, tmp_path / "half", like=tiny, dtype="bfloat16")
    assert load_model(tmp_path / "half").language.wte[0, 0] == np.float32(jnp.bfloat16(model.language.wte[0, 0]))


class TestUnsoundCheckpoints:
    """Everything wrong is named in one line before any data is read."""

    @pytest.fixture
    def folder(self, tmp_path):
        return make_checkpoint(tmp_path / "hf", shards=3)

    @staticmethod
    def message(folder):
        with pytest.raises(UserError) as e:
            load_model(folder)
        assert "\n" not in str(e.value)
        return str(e.value)

    @staticmethod
    def edit(folder, change):
        """Rewrites the checkpoint as one file after `change(tensors)`."""
        tensors = {}
        for file in folder.glob("*.safetensors"):
            tensors |= load_file(file)
            file.unlink()
        (folder / "model.safetensors.index.json").unlink()
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    def test_unmapped_missing_and_misshapen_tensors_in_one_error(self, folder):
        def change(tensors):
            del tensors["transformer.h.1.mlp.w1.weight"], tensors["lm_head.weight"]
            tensors["transformer.h.0.attn.c_attn.weight"] = tensors["transformer.h.0.attn.c_attn.weight"].T.copy()
            tensors["transformer.h.7.ln_1.weight"] = tensors["transformer.ln_f.weight"].copy()
            tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].astype(np.int64)

        self.edit(folder, change)
        message = self.message(folder)
        assert "missing: transformer.h.1.mlp.w1.weight, lm_head.weight" in message
        assert "not part of this model: transformer.h.7.ln_1.weight" in message
        assert "wrong shape: transformer.h.0.attn.c_attn.weight is [256, 768] and should be [768, 256]" in message
        assert "not of a floating-point type: transformer.wte.weight" in message

    def test_hundreds_of_them_are_counted(self, folder):
        self.edit(folder, lambda tensors: tensors.update({f"extra.{i}": np.zeros(1) for i in range(300)}))
        assert "and 250 more" in self.message(folder)

    def test_broken_files_and_misfits_together(self, folder):
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        cut, gone, whole = sorted(set(index.values()))
        (folder / cut).write_bytes((folder / cut).read_bytes()[:-100])
        (folder / gone).unlink()
        tensors = load_file(folder / whole)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:5]
        save_file(tensors, folder / whole)
        message = self.message(folder)
        assert f"{cut} is truncated" in message
        assert f"{gone} is missing" in message
        assert "lm_head.weight is [5, 256] and should be" in message
        assert "missing: " not in message  # the tensors of broken files are accounted for by the files

    def test_buffers_that_the_model_computes_are_not_missed_or_minded(self, folder):
        extra = {"transformer.rotary_emb.inv_freq": np.zeros(4), "transformer.h.0.attn.masked_bias": np.zeros(())}
        self.edit(folder, lambda tensors: tensors.update(extra))
        load_model(folder)

    @pytest.mark.parametrize(
        ("path", "problem"), [("absent", "no such folder"), (".", "config.json: not found; . is not a checkpoint")]
    )
    def test_not_a_checkpoint(self, path, problem, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert problem in self.message(path)

    def test_a_damaged_converted_folder(self, folder, tmp_path):
        dst = tmp_path / "converted"
        convert(folder, dst, progress=False)
        weights = dst / "weights"
        (weights / "language.wte" / "0.0").unlink()
        cut = weights / "visual.proj" / "0.0"
        cut.write_bytes(cut.read_bytes()[:-1])
        for file in (weights / "language.ln_f.weight").iterdir():
            file.unlink()
        message = self.message(dst)
        assert "missing: language.ln_f.weight" in message
        assert "missing or truncated files: language.wte/0.0, visual.proj/0.0" in message

    def test_a_converted_folder_of_another_format(self, folder, tmp_path):
        convert(folder, tmp_path / "converted", progress=False)
        marker = tmp_path / "converted" / "silkie.json"
        marker.write_text('{"format": 2}')
        assert "written in format 2, this version reads format 1" in self.message(tmp_path / "converted")
        marker.write_text("{")
        assert "silkie.json: damaged" in self.message(tmp_path / "converted")


def test_mixed_types_are_kept_where_layers_agree_and_widened_where_they_do_not(tmp_path):
    folder = make_checkpoint(tmp_path / "hf", shards=1, dtype="bfloat16")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name in ("transformer.h.0.ln_1.weight", "transformer.ln_f.weight"):
        tensors[name] = tensors[name].astype(np.float32) + 1e-4
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float64)
    save_file(tensors, file)
    source = sources.open_source(folder)
    kinds = {path: dtype.name for path, dtype in source.dtypes.items() if dtype.name != "bfloat16"}
    assert kinds == dict.fromkeys(
        ["language.layers.ln_1.weight", "language.ln_f.weight", "language.lm_head.weight"], "float32"
    )
    model = load_model(folder)
    stored = list_folder(folder).tensors
    for layer in range(2):
        values = stored[f"transformer.h.{layer}.ln_1.weight"].read(0, 256).astype(np.float32)
        np.testing.assert_array_equal(model.language.layers.ln_1.weight[layer], values)
