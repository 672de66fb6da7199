"""Conversion and export: bit-equal round trips, the Orbax checkpoint, interruptions, unsound inputs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from examples.tiny_qwen_vl import make_checkpoint
from silkie_jax.checkpoints import convert as convert_module
from silkie_jax.checkpoints import export as export_module
from silkie_jax.checkpoints import folders, sources
from silkie_jax.checkpoints.convert import convert
from silkie_jax.checkpoints.export import export
from silkie_jax.checkpoints.sources import open_source, pieces
from silkie_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny") / "hf", shards=3)
    (folder / "modeling_qwen.py").write_text("# the official code travels along\n")
    (folder / "LICENSE").write_text("terms\n")
    (folder / "notes.pdf").write_bytes(b"does not travel")
    return folder


@pytest.fixture(params=["whole leaves", "small pieces"])
def cut(request, monkeypatch):
    if request.param == "small pieces":
        monkeypatch.setattr(sources, "_PIECE", 50_000)


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def stored(folder):
    """Every leaf's raw values, through the same interface for both forms."""
    source = open_source(folder)
    return {path: [source.read(p) for p in pieces(leaf, source.dtypes[path])] for path, leaf in source.tree.items()}


def assert_same_tensors(one, other):
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert (values.dtype, values.shape) == (second[name].dtype, second[name].shape), name
        np.testing.assert_array_equal(values.view(np.uint8), second[name].view(np.uint8), err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back_is_bit_equal(tmp_path, cut, dtype):
    source = make_checkpoint(tmp_path / "hf", dtype=dtype)
    convert(source, tmp_path / "converted", progress=False)
    export(tmp_path / "converted", tmp_path / "back", progress=False, shard_bytes=10**6)
    assert_same_tensors(source, tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again", progress=False)
    first, second = stored(tmp_path / "converted"), stored(tmp_path / "again")
    for path, values in first.items():
        for a, b in zip(values, second[path], strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), err_msg=path)


def test_the_golden_checkpoint_there_and_back(golden, tmp_path):
    convert(golden / "tiny-qwen-vl", tmp_path / "converted", progress=False)
    export(tmp_path / "converted", tmp_path / "back", progress=False)
    assert_same_tensors(golden / "tiny-qwen-vl", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((golden / "tiny-qwen-vl" / "config.json").read_text())


def test_casting_rounds_to_nearest_even(tiny, tmp_path):
    convert(tiny, tmp_path / "half", dtype="bfloat16", progress=False)
    export(tmp_path / "half", tmp_path / "back", progress=False)
    export(tiny, tmp_path / "direct", dtype="bfloat16", progress=False)
    assert_same_tensors(tmp_path / "back", tmp_path / "direct")
    for name, values in tensors(tmp_path / "back").items():
        expected = np.asarray(jnp.asarray(tensors(tiny)[name]).astype(jnp.bfloat16))
        np.testing.assert_array_equal(values, expected, err_msg=name)
    export(tmp_path / "half", tmp_path / "wide", dtype="float32", progress=False)
    assert {v.dtype.name for v in tensors(tmp_path / "wide").values()} == {"float32"}


def test_what_travels_with_the_weights(tiny, tmp_path):
    convert(tiny, tmp_path / "converted", dtype="bfloat16", progress=False)
    export(tmp_path / "converted", tmp_path / "back", progress=False, shard_bytes=10**6)
    side = {"config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken"}
    side |= {"modeling_qwen.py", "LICENSE"}
    assert {p.name for p in (tmp_path / "converted").iterdir()} == side | {"silkie.json", "weights"}
    shards = {p.name for p in (tmp_path / "back").glob("*.safetensors")}
    assert {p.name for p in (tmp_path / "back").iterdir()} == side | shards | {"model.safetensors.index.json"}
    for name in side - {"config.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (tiny / name).read_bytes()
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    before = json.loads((tiny / "config.json").read_text())
    changes = {"torch_dtype": "bfloat16", "bf16": True, "fp32": False}
    assert config == before | changes


def test_a_small_export_is_one_file_without_index(tiny, tmp_path):
    export(tiny, tmp_path / "back", progress=False)
    assert [p.name for p in (tmp_path / "back").glob("model.*")] == ["model.safetensors"]


def test_bin_shards_convert_to_the_same_weights(tmp_path):
    pytest.importorskip("torch", reason="needs the torch extra")
    for name, safetensors in (("safe", True), ("bin", False)):
        source = make_checkpoint(tmp_path / name, dtype="bfloat16", safetensors=safetensors, shards=3)
        export(source, tmp_path / f"{name}-out", progress=False)
    assert_same_tensors(tmp_path / "safe-out", tmp_path / "bin-out")


class TestOrbax:
    """`weights/` is an Orbax checkpoint like any other."""

    @pytest.fixture
    def weights(self, tiny, tmp_path, cut):
        convert(tiny, tmp_path / "converted", progress=False)
        return tmp_path / "converted" / "weights"

    def check(self, tree, tiny):
        values = stored(tiny)
        for keys, array in jax.tree.leaves_with_path(tree):
            path = ".".join(k.key for k in keys)
            expected = np.concatenate([v.ravel() for v in values.pop(path)])
            np.testing.assert_array_equal(np.asarray(array).ravel(), expected, err_msg=path)
        assert not values

    def test_restores_as_it_is(self, weights, tiny):
        self.check(ocp.StandardCheckpointer().restore(weights), tiny)
        self.check(ocp.PyTreeCheckpointer().restore(weights), tiny)

    @pytest.mark.parametrize("split", [(1, 8), (2, 4), (8, 1)])
    def test_restores_onto_a_mesh(self, weights, tiny, split):
        mesh = jax.make_mesh(split, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

        def abstract(meta):
            dims = [("model" if n % split[1] == 0 else None) if i == 1 else None for i, n in enumerate(meta.shape)]
            return jax.ShapeDtypeStruct(meta.shape, meta.dtype, sharding=NamedSharding(mesh, PartitionSpec(*dims)))

        checkpointer = ocp.StandardCheckpointer()
        target = jax.tree.map(abstract, checkpointer.metadata(weights).item_metadata.tree)
        tree = checkpointer.restore(weights, target)
        assert tree["language"]["wte"].sharding == target["language"]["wte"].sharding
        self.check(tree, tiny)


class TestInterruption:
    """Whatever happens, an unfinished folder never has the name of a finished one."""

    def test_an_error_leaves_nothing(self, tiny, tmp_path, monkeypatch):
        def fail(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(convert_module, "write_marker", fail)
        with pytest.raises(KeyboardInterrupt):
            convert(tiny, tmp_path / "out", progress=False)
        monkeypatch.setattr(export_module, "index_of", fail)
        with pytest.raises(KeyboardInterrupt):
            export(tiny, tmp_path / "out", progress=False, shard_bytes=10**6)
        assert not list(tmp_path.iterdir())

    SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began the tests in the background
from silkie_jax.checkpoints import {verb}
task = {verb}.read_ahead
def slow(tasks):
    for i, done in enumerate(task(tasks)):
        if i == 20:
            print("halfway", flush=True)
            for _ in range(600):  # a signal that another thread got would wait for the end of one long sleep
                time.sleep(0.1)
        yield done
{verb}.read_ahead = slow
{verb}.{verb}(sys.argv[1], sys.argv[2], progress=False)
"""

    def start(self, verb, tiny, dst):
        command = [sys.executable, "-c", self.SLOW.format(verb=verb), str(tiny), str(dst)]
        environment = os.environ | {"XLA_FLAGS": ""}
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        assert process.stdout.readline() == b"halfway\n"
        return process

    @pytest.mark.parametrize("verb", ["convert", "export"])
    def test_killed_and_run_again(self, tiny, tmp_path, verb):
        dst = tmp_path / "out"
        run = {"convert": convert, "export": export}[verb]
        process = self.start(verb, tiny, dst)
        with pytest.raises(UserError, match="another process is writing it"):
            run(tiny, dst, progress=False)
        process.kill()
        process.wait()
        assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
        with pytest.raises(UserError, match="no such folder"):
            open_source(dst)
        run(tiny, dst, progress=False)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        open_source(dst)

    def test_ctrl_c(self, tiny, tmp_path):
        process = self.start("convert", tiny, tmp_path / "out")
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
        assert process.returncode != 0
        assert not list(tmp_path.iterdir())


class TestRefusals:
    @pytest.mark.parametrize("run", [convert, export])
    def test_an_existing_folder_is_not_touched(self, tiny, tmp_path, run):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        with pytest.raises(UserError, match="already exists"):
            run(tiny, tmp_path / "out", progress=False)
        assert (tmp_path / "out" / "precious").exists()

    def test_a_foreign_partial_folder_is_not_touched(self, tiny, tmp_path):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / "precious").touch()
        with pytest.raises(UserError, match=r"out.partial: in the way"):
            convert(tiny, tmp_path / "out", progress=False)
        assert (tmp_path / "out.partial" / "precious").exists()

    def test_an_empty_folder_may_be_filled(self, tiny, tmp_path):
        (tmp_path / "out").mkdir()
        convert(tiny, tmp_path / "out", progress=False)
        open_source(tmp_path / "out")

    def test_a_disk_that_is_too_small(self, tiny, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
        monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(UserError, match=rf"^{tmp_path}: .* GB are needed and 0\.0 GB are free"):
            convert(tiny, tmp_path / "out", progress=False)
        assert not list(tmp_path.iterdir())

    def test_an_unknown_type(self, tiny, tmp_path):
        with pytest.raises(UserError, match="dtype: 'int8' is not one of float32, bfloat16"):
            convert(tiny, tmp_path / "out", dtype="int8", progress=False)

    def test_an_unsound_checkpoint_makes_nothing(self, tmp_path):
        source = make_checkpoint(tmp_path / "hf", shards=2)
        (source / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors is missing"):
            convert(source, tmp_path / "out", progress=False)
        assert [p.name for p in tmp_path.iterdir()] == ["hf"]

    @pytest.mark.parametrize("src", ["absent", "./absent/folder", "/absent/folder", "a/b/c"])
    def test_neither_a_folder_nor_a_hub_name(self, src, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            convert(src, tmp_path / "out")


def test_progress_is_shown_in_bytes(tiny, tmp_path, capsys):
    convert(tiny, tmp_path / "out")
    shown = capsys.readouterr()
    assert "convert: 100%" in shown.err
    assert "MB" in shown.err or "B/s" in shown.err
    assert not shown.out


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    """At the smallest scale: it also compares the export with the source, byte for byte."""
    command = [sys.executable, "benchmarks/convert.py", "--scale", "tiny", "--folder", tmp_path]
    done = subprocess.run([*command, "--out", tmp_path / "r.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (tmp_path / "r.md").read_text().count("GiB |") == 5
    assert "time / mean plain copy" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["r.md"]
