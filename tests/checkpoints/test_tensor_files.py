"""Headers of safetensors and .bin files: what is sound is listed, what is not is named before any data is read."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from silkie_jax.checkpoints.tensor_files import OTHER, index_of, list_files, list_folder, plan_shards
from silkie_jax.errors import UserError


def save(folder, file, **tensors):
    save_file({name: np.asarray(value) for name, value in tensors.items()}, folder / file)


def save_index(folder, **weight_map):
    text = json.dumps({"weight_map": {name: file + ".safetensors" for name, file in weight_map.items()}})
    (folder / "model.safetensors.index.json").write_text(text)


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_reads_any_part_of_a_tensor_of_any_float_type(tmp_path, dtype):
    values = np.arange(24).reshape(2, 3, 4).astype(dtype)
    save(tmp_path, "model.safetensors", first=np.ones(5, np.float32), x=values)
    tensor = list_folder(tmp_path).tensors["x"]
    assert tensor.dtype == values.dtype
    assert tensor.shape == (2, 3, 4)
    np.testing.assert_array_equal(tensor.read(0, 24), values.ravel())
    np.testing.assert_array_equal(tensor.read(5, 17), values.ravel()[5:17])


def test_a_type_that_weights_never_have_is_listed_without_a_type(tmp_path):
    save(tmp_path, "model.safetensors", ids=np.arange(4))
    listing = list_folder(tmp_path)
    assert listing.tensors["ids"].dtype == OTHER
    assert not listing.problems


def test_a_sharded_folder(tmp_path):
    save(tmp_path, "one.safetensors", a=np.zeros(2, np.float32))
    save(tmp_path, "two.safetensors", b=np.zeros(3, np.float32))
    save_index(tmp_path, a="one", b="two")
    listing = list_folder(tmp_path)
    assert {n: t.shape for n, t in listing.tensors.items()} == {"a": (2,), "b": (3,)}
    assert not listing.problems
    assert not listing.lost


def test_everything_wrong_with_the_files_is_found_at_once(tmp_path):
    save(tmp_path, "one.safetensors", a=np.zeros(2, np.float32), stray=np.zeros(1, np.float32))
    save(tmp_path, "cut.safetensors", b=np.zeros(300, np.float32))
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    save_index(tmp_path, a="one", absent="one", b="cut", c="gone")
    listing = list_folder(tmp_path)
    assert listing.lost == {"absent", "b", "c"}
    assert len(listing.problems) == 4
    text = "; ".join(listing.problems)
    assert f"cut.safetensors is truncated: {len(whole) - 1} bytes of {len(whole)}" in text
    assert "gone.safetensors is missing" in text
    assert "one.safetensors does not hold absent, which the index puts there" in text
    assert "one.safetensors holds stray, which the index does not put there" in text


def test_a_tensor_in_two_files(tmp_path):
    for file in ("one", "two"):
        save(tmp_path, f"{file}.safetensors", a=np.zeros(2, np.float32))
    listing = list_files(sorted(tmp_path.iterdir()))
    assert listing.problems == ["a is in both one.safetensors and two.safetensors"]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        ({"a": ENTRY, "b": ENTRY}, bytes(8), "overlapping tensors (b)"),
        ({"a": ENTRY | {"shape": [3]}}, bytes(8), "gives a 8 bytes, but F32 [3] needs another number"),
        ({"a": ENTRY | {"shape": [-2]}}, bytes(8), "malformed entry for a"),
        ({"a": ENTRY | {"shape": [2.0]}}, bytes(8), "malformed entry for a"),
        ({"a": ENTRY | {"data_offsets": [0]}}, bytes(8), "malformed entry for a"),
        ({"a": {"dtype": "F32"}}, bytes(8), "malformed entry for a"),
        ({"a": 1}, bytes(8), "malformed entry for a"),
        ({"a": ENTRY}, bytes(4), "is truncated"),
        ({"a": ENTRY}, bytes(12), "4 bytes that belong to no tensor"),
        ({"a": {"dtype": "U4", "shape": [2], "data_offsets": [8, 0]}}, bytes(8), "malformed entry for a"),
        (b'{"a": {}, "b": {}, "a": {}}', b"", "two entries for a"),
        ([], b"", "not a table of tensors"),
        (b"{", b"", "header that is not JSON"),
        (b"\xff" * 8, b"", "header that is not JSON"),
        (b"[" * 100_000, b"", "header that is not JSON"),
    ],
)
def test_a_damaged_header(tmp_path, header, data, problem):
    write_raw(tmp_path / "model.safetensors", header, data)
    (found,) = list_folder(tmp_path).problems
    assert found.startswith("model.safetensors ")
    assert problem in found


@pytest.mark.parametrize("content", [b"", b"\x08", struct.pack("<Q", 2**63) + b"{}", b"version https://git-lfs"])
def test_a_file_that_is_no_safetensors_file_at_all(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    (found,) = list_folder(tmp_path).problems
    assert "truncated or no safetensors file" in found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}'])
def test_a_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="not an index of tensors"):
        list_folder(tmp_path)


@pytest.mark.parametrize("file", ["/etc/passwd", "../x.safetensors", "sub/x.safetensors"])
def test_an_index_cannot_point_outside_its_folder(tmp_path, file):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match="outside its folder"):
        list_folder(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(UserError, match="no weights found"):
        list_folder(tmp_path)


def test_written_files_are_read_by_the_safetensors_library(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"t{i}": rng.standard_normal((i + 1, 7)).astype(ml_dtypes.bfloat16) for i in range(9)}
    shards = plan_shards(((n, v.dtype, v.shape) for n, v in tensors.items()), limit=200)
    for shard in shards:
        shard.write(tmp_path, (half for n in shard.tensors for half in np.array_split(tensors[n].ravel(), 2)))
    index = index_of(shards)
    assert len(shards) > 3
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())
    for name, values in tensors.items():
        np.testing.assert_array_equal(load_file(tmp_path / index["weight_map"][name])[name], values)


def test_shards_keep_to_their_limit_and_a_single_one_needs_no_number():
    kinds = [(str(i), np.dtype(np.float32), (10,)) for i in range(5)]
    assert [list(s.tensors) for s in plan_shards(kinds, 80)] == [["0", "1"], ["2", "3"], ["4"]]
    assert [s.file for s in plan_shards(kinds, 10**9)] == ["model.safetensors"]
    assert [len(s.tensors) for s in plan_shards(kinds, 1)] == [1] * 5  # a larger tensor gets a file of its own


class TestTorchFiles:
    """PyTorch .bin files, through the torch extra."""

    @pytest.fixture(autouse=True)
    def torch(self):
        return pytest.importorskip("torch", reason="needs the torch extra")

    def test_every_type_shared_storages_and_views(self, tmp_path, torch):
        whole = torch.arange(40, dtype=torch.float32).reshape(8, 5)
        contents = {"whole": whole, "rows": whole[2:4], "half": whole.bfloat16(), "double": whole.double()}
        torch.save(contents, tmp_path / "pytorch_model.bin")
        listing = list_folder(tmp_path)
        assert not listing.problems
        for name, expected in contents.items():
            tensor = listing.tensors[name]
            assert tensor.shape == tuple(expected.shape)
            values = tensor.read(0, expected.numel()).astype(np.float32)
            np.testing.assert_array_equal(values, expected.float().numpy().ravel())

    def test_integers_are_listed_without_a_type(self, tmp_path, torch):
        torch.save({"ids": torch.arange(3)}, tmp_path / "pytorch_model.bin")
        assert list_folder(tmp_path).tensors["ids"].dtype == OTHER

    def test_what_is_not_plain_tensors_is_refused(self, tmp_path, torch):
        import os

        class Hostile:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "was-run"),)

        torch.save({"a": torch.zeros(1), "b": Hostile()}, tmp_path / "pytorch_model.bin")
        (problem,) = list_folder(tmp_path).problems
        assert problem == "pytorch_model.bin holds more than plain tensors and is refused (weights_only)"
        assert not (tmp_path / "was-run").exists()

    def test_truncated(self, tmp_path, torch):
        path = tmp_path / "pytorch_model.bin"
        torch.save({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:-10])
        (problem,) = list_folder(tmp_path).problems
        assert "is truncated" in problem

    @pytest.mark.parametrize("contents", [[1, 2], {"a": 3}])
    def test_other_contents(self, tmp_path, torch, contents):
        torch.save(contents, tmp_path / "pytorch_model.bin")
        (problem,) = list_folder(tmp_path).problems
        assert "not a table of tensors" in problem

    def test_transposed_tensors_are_named(self, tmp_path, torch):
        torch.save({"a": torch.zeros(2, 3).T}, tmp_path / "pytorch_model.bin")
        (problem,) = list_folder(tmp_path).problems
        assert "holds a in a form that is not contiguous" in problem


def test_bin_files_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install 'silkie-jax\[torch\]'"):
        list_folder(tmp_path)
