"""PEFT adapters: loaded, merged, saved, and refused in one line where they cannot be honoured."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from examples.tiny_qwen_vl import make_checkpoint
from silkie_jax.checkpoints import sources
from silkie_jax.checkpoints.export import export
from silkie_jax.checkpoints.peft import load_adapter, save_adapter
from silkie_jax.checkpoints.weights import load_model
from silkie_jax.errors import UserError
from silkie_jax.nn.lora import add_lora

SILKIE = ("c_attn", "attn.c_proj", "w1", "w2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "hf")


def adapted(tiny, targets=SILKIE, rank=4, alpha=8.0, seed=0):
    """The tiny model with a random adapter, both factors non-zero."""
    model = load_model(tiny)
    add_lora(model, rank, alpha, targets, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for path, values in factors(model).items():
        node = model.language.layers
        *above, last = path.split(".")
        for key in above:
            node = getattr(node, key)
        getattr(node, last)[...] = rng.standard_normal(values.shape).astype(np.float32) / 8
    return model


def factors(model):
    flat = nnx.to_flat_state(nnx.state(model.language.layers, nnx.LoRAParam))
    return {".".join(keys): np.asarray(variable[...]) for keys, variable in flat}


@pytest.fixture
def adapter(tiny, tmp_path):
    save_adapter(adapted(tiny), tmp_path / "adapter", base_model="Qwen/Qwen-VL-Chat")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_saved_and_loaded(tiny, tmp_path):
    model = adapted(tiny, rank=3, alpha=7.5)
    for _ in range(2):  # the second time in place of the first
        save_adapter(model, tmp_path / "adapter", base_model="Qwen/Qwen-VL-Chat")
    again = load_model(tiny, adapter=tmp_path / "adapter")
    first, second = factors(model), factors(again)
    assert first.keys() == second.keys()
    for path, values in first.items():
        np.testing.assert_array_equal(second[path], values, err_msg=path)
    assert again.language.layers.attn.c_attn.lora_scale == 7.5 / 3
    assert again.language.layers.attn.c_attn.lora_b.shape == (2, 3, 256, 3)


def test_loading_replaces_an_adapter(tiny, adapter, tmp_path):
    model = adapted(tiny, targets=("mlp.c_proj", "w1"), rank=2)
    load_adapter(model, adapter)
    assert factors(model).keys() == factors(load_model(tiny, adapter=adapter)).keys()
    assert model.language.layers.mlp.c_proj.lora_a is None


def test_the_decoders_mlp_c_proj_is_saved_so_that_peft_does_not_take_the_vision_towers(tiny, tmp_path):
    save_adapter(adapted(tiny, targets=("mlp.c_proj", "w1")), tmp_path / "adapter", base_model="x")
    pattern = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert pattern == r"transformer\.h\.\d+\.(mlp\.w1|mlp\.c_proj)"
    again = load_model(tiny, adapter=tmp_path / "adapter")
    assert again.language.layers.mlp.c_proj.lora_a is not None


def test_factors_are_sharded_like_their_weights(tiny, adapter):
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    table = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}

    def sharding_of(axes, shape):
        return NamedSharding(mesh, PartitionSpec(*(table.get(a) for a in axes)))

    model = load_model(tiny, adapter=adapter, sharding_of=sharding_of)
    lora = model.language.layers.attn.c_attn
    assert lora.lora_a[...].sharding == NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    assert lora.lora_b[...].sharding == NamedSharding(mesh, PartitionSpec(None, None, "tensor", None))
    expected = factors(load_model(tiny, adapter=adapter))
    for path, values in factors(model).items():
        np.testing.assert_array_equal(values, expected[path], err_msg=path)


def test_several_adapters_are_added_and_rounded_once(tiny, tmp_path):
    """W + the sum of all scale B A, as rounds that start from the same weights need it."""
    for seed in (0, 1):
        save_adapter(adapted(tiny, ("c_attn", "w1"), seed=seed), tmp_path / str(seed), base_model="base")
    folders = [tmp_path / "0", tmp_path / "1"]
    export(tiny, tmp_path / "both", adapter=folders, progress=False)
    base, both = {}, load_file(tmp_path / "both/model.safetensors")
    for file in tiny.glob("*.safetensors"):
        base |= load_file(file)
    changed = 0
    for name, values in base.items():
        sums = values.astype(np.float64)
        for folder in folders:
            factors_of = load_file(folder / "adapter_model.safetensors")
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if key + "A.weight" in factors_of:
                sums = sums + 2.0 * factors_of[key + "B.weight"].astype(np.float64) @ factors_of[key + "A.weight"]
                changed += 1
        np.testing.assert_allclose(both[name], sums, rtol=1e-5, atol=1e-5, err_msg=name)
    assert changed == 2 * 2 * 2  # adapters, layers and targets


@pytest.mark.parametrize("piece", [2**25, 20_000])
@pytest.mark.parametrize("rslora", [False, True])
def test_merging_is_w_plus_scale_b_a(tiny, tmp_path, monkeypatch, piece, rslora):
    save_adapter(adapted(tiny, targets=("c_attn", "w2")), tmp_path / "adapter", base_model="x")
    edit_config(tmp_path / "adapter", use_rslora=rslora)
    monkeypatch.setattr(sources, "_PIECE", piece)
    export(tiny, tmp_path / "merged", adapter=tmp_path / "adapter", progress=False)
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = {}
    for file in tiny.glob("*.safetensors"):
        base |= load_file(file)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    scale = 8 / math.sqrt(4) if rslora else 8 / 4
    changed = 0
    for name, values in base.items():
        key = "base_model.model." + name.removesuffix("weight") + "lora_{}.weight"
        if key.format("A") in lora:
            a, b = (lora[key.format(f)].astype(np.float64) for f in "AB")
            np.testing.assert_allclose(merged[name], values + scale * b @ a, atol=1e-6)
            changed += 1
        else:
            np.testing.assert_array_equal(merged[name], values)
    assert changed == 4


class TestGolden:
    @pytest.fixture(params=["lora_adapter", "lora_adapter_bin"])
    def folder(self, golden, request):
        if request.param.endswith("bin"):
            pytest.importorskip("torch", reason="needs the torch extra")
        return golden / request.param

    def test_logits_with_the_adapter(self, golden, folder):
        arrays, inputs = np.load(golden / "lora.npz"), np.load(golden / "inputs_outputs.npz")
        model = load_model(golden / "tiny-qwen-vl", adapter=folder)
        logits = np.asarray(model(inputs["text_short/input_ids"]))[0]
        positions = arrays["text_short/adapter_eval_logits_pos"]
        expected = arrays["text_short/adapter_eval_logits"][0]
        np.testing.assert_allclose(logits[positions], expected, atol=2e-4, rtol=0)

    def test_merged(self, golden, folder, tmp_path):
        arrays, inputs = np.load(golden / "lora.npz"), np.load(golden / "inputs_outputs.npz")
        export(golden / "tiny-qwen-vl", tmp_path / "merged", adapter=folder, progress=False)
        name = "transformer.h.0.attn.c_proj.weight"
        weight = load_file(tmp_path / "merged" / "model.safetensors")[name]
        np.testing.assert_allclose(weight, arrays[f"merged/{name}"], atol=1e-6, rtol=0)
        logits = load_model(tmp_path / "merged")(inputs["text_short/input_ids"])
        np.testing.assert_allclose(logits, arrays["text_short/merged_eval_logits"], atol=2e-4, rtol=0)

    def test_saved_again_it_is_the_same(self, golden, folder, tmp_path):
        model = load_model(golden / "tiny-qwen-vl", adapter=folder)
        save_adapter(model, tmp_path / "again", base_model="tiny-qwen-vl")
        first = load_file(golden / "lora_adapter" / "adapter_model.safetensors")
        second = load_file(tmp_path / "again" / "adapter_model.safetensors")
        assert first.keys() == second.keys()
        for key, values in first.items():
            np.testing.assert_array_equal(second[key], values, err_msg=key)
        before, after = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path / "again"))
        assert after.pop("target_modules") == ["attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2"]
        assert before.pop("target_modules") == ["c_attn", "attn.c_proj", "w1", "w2"]
        assert after == before


class TestRefusals:
    @staticmethod
    def message(tiny, folder):
        with pytest.raises(UserError) as e:
            load_model(tiny, adapter=folder)
        assert "\n" not in str(e.value)
        return str(e.value)

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'; only LORA"),
            ({"use_dora": True}, "not supported: use_dora = True"),
            ({"bias": "all", "modules_to_save": ["wte"]}, "not supported: bias = 'all', modules_to_save = ['wte']"),
            ({"rank_pattern": {"w1": 8}}, "not supported: rank_pattern = {'w1': 8}"),
            ({"fan_in_fan_out": True}, "not supported: fan_in_fan_out = True"),
            ({"layers_to_transform": [0]}, "not supported: layers_to_transform = [0]"),
            ({"init_lora_weights": "pissa"}, "not supported: init_lora_weights = 'pissa'"),
            ({"r": 0}, "r must be a positive integer"),
            ({"lora_alpha": None}, "lora_alpha a number, not 4 and None"),
            ({"target_modules": None}, "target_modules must be"),
            ({"target_modules": "("}, "not a regular expression"),
            ({"target_modules": "all-linear"}, "adapts the vision tower too"),
            ({"target_modules": ["q_proj"]}, "match no module; there are attn.c_attn, attn.c_proj"),
            ({"target_modules": ["c_proj"]}, "also match transformer.visual.transformer.resblocks.0.mlp.c_proj;"),
            ({"target_modules": ["c_attn", "lm_head"]}, "also match lm_head;"),
            ({"target_modules": ["h.0.attn.c_attn"]}, "match attn.c_attn in some layers only"),
        ],
    )
    def test_what_cannot_be_honoured(self, tiny, adapter, change, problem):
        edit_config(adapter, **change)
        assert problem in self.message(tiny, adapter)

    def test_all_tensors_that_do_not_fit_in_one_error(self, tiny, adapter):
        path = adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        prefix = "base_model.model.transformer"
        del tensors[f"{prefix}.h.1.mlp.w1.lora_A.weight"]
        tensors[f"{prefix}.h.0.mlp.w1.lora_A.weight"] = np.zeros((8, 256), np.float32)
        tensors[f"{prefix}.visual.proj.lora_A.weight"] = np.zeros((4, 256), np.float32)
        save_file(tensors, path)
        message = self.message(tiny, adapter)
        assert f"missing: {prefix}.h.1.mlp.w1.lora_A.weight" in message
        assert f"wrong shape: {prefix}.h.0.mlp.w1.lora_A.weight is [8, 256] and should be [4, 256]" in message
        assert f"not part of this model: {prefix}.visual.proj.lora_A.weight" in message

    def test_an_adapter_of_another_model(self, adapter, tmp_path):
        other = make_checkpoint(tmp_path / "wide", hidden=128, heads=4)
        assert "wrong shape: base_model.model.transformer.h.0.attn.c_attn" in self.message(other, adapter)

    def test_a_truncated_file(self, tiny, adapter):
        path = adapter / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert "adapter_model.safetensors is truncated" in self.message(tiny, adapter)

    def test_no_adapter_there(self, tiny, adapter, tmp_path):
        (adapter / "adapter_model.safetensors").unlink()
        assert "holds neither adapter_model.safetensors nor" in self.message(tiny, adapter)
        assert "adapter_config.json: not found" in self.message(tiny, tmp_path)
        (adapter / "adapter_config.json").write_text("{")
        assert "not readable as JSON" in self.message(tiny, adapter)

    def test_a_refused_adapter_leaves_the_model_as_it_was(self, tiny, adapter):
        model = adapted(tiny, seed=1)
        before = factors(model)
        edit_config(adapter, bias="all")
        with pytest.raises(UserError):
            load_adapter(model, adapter)
        for path, values in factors(model).items():
            np.testing.assert_array_equal(values, before[path])

    def test_a_model_without_an_adapter_saves_none(self, tiny, tmp_path):
        with pytest.raises(UserError, match="carries no adapter"):
            save_adapter(load_model(tiny), tmp_path / "adapter", base_model="x")
        assert not list(tmp_path.iterdir())

    def test_other_folders_are_not_replaced(self, tiny, tmp_path):
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "thesis.txt").touch()
        with pytest.raises(UserError, match="already exists"):
            save_adapter(adapted(tiny), tmp_path / "precious", base_model="x")
        assert (tmp_path / "precious" / "thesis.txt").exists()


@pytest.mark.parametrize("targets", [SILKIE, ("mlp.c_proj", "w2")])
def test_peft_itself_loads_what_is_saved(tiny, tmp_path, targets):
    """On a torch model with the official module names and Linear layers in the official places."""
    peft = pytest.importorskip("peft", reason="needs peft")
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from silkie_jax.models.qwen_vl.config import QwenVLConfig
    from silkie_jax.models.qwen_vl.names import leaves, official_tensors

    model = adapted(tiny, targets=targets)
    save_adapter(model, tmp_path / "adapter", base_model="tiny")

    class Bare(torch.nn.Module):
        """Modules of the official names and sizes; their forward is not needed."""

    root = Bare()
    root.config = {"model_type": "qwen"}
    root.prepare_inputs_for_generation = None  # PEFT asks for it
    for name, leaf, _ in official_tensors(leaves(QwenVLConfig.from_folder(tiny))):
        *above, last = name.split(".")
        if last != "weight" or len(leaf.official) != 2:
            continue
        node = root
        for key in above[:-1]:
            if not hasattr(node, key):
                node.add_module(key, Bare())
            node = getattr(node, key)
        node.add_module(above[-1], torch.nn.Linear(leaf.official[1], leaf.official[0], bias=False))
    wrapped = peft.PeftModel.from_pretrained(root, tmp_path / "adapter")
    loaded = peft.get_peft_model_state_dict(wrapped)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert loaded.keys() == saved.keys()
    for key, values in saved.items():
        np.testing.assert_array_equal(loaded[key].numpy(), values, err_msg=key)
    layer = wrapped.base_model.model.transformer.h.get_submodule("0.mlp.w2")
    assert layer.scaling == {"default": 8 / 4}
    # What PEFT writes is read here again, unchanged.
    wrapped.save_pretrained(tmp_path / "peft")
    again = factors(load_model(tiny, adapter=tmp_path / "peft"))
    for path, values in factors(model).items():
        np.testing.assert_array_equal(again[path], values, err_msg=path)
