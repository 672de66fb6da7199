"""Shards are whole or absent, a finished corpus opens anywhere, and a damaged or unfinished one is refused by name."""

import errno
import fcntl
import io
import json
import math
import os
import pickle
import subprocess
import sys

import pytest
from PIL import Image

from silkie_jax.corpus.reader import CorpusReader
from silkie_jax.corpus.schema import Record, Response
from silkie_jax.corpus.shards import CorpusBuilder
from silkie_jax.errors import UserError


def image(colour, size=(20, 10), mode="RGB", format="PNG"):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def records():
    images = [(), (image(0),), (image(1), image((1, 2, 3), (7, 9), format="JPEG")), (image(5, mode="L"),)]
    return [
        Record(
            id=f"r{i}",
            images=images[i % 4],
            prompt=f"prompt {i}",
            responses=tuple(Response(f"text {i} {j}", f"m{j}", {"A": math.nan if j else i + 0.5}) for j in range(3)),
            history=(("question", "answer"),) * (i % 3),
            pairs=((0, 1),) * (i % 2),
        )
        for i in range(10)
    ]


def build(folder, records, shards=3):
    with CorpusBuilder(folder, "toy", shards) as builder:
        chunks = [records[len(records) * n // shards : len(records) * (n + 1) // shards] for n in range(shards)]
        entries = [builder.write(n, f"key {n}", chunk, {"n": n}) for n, chunk in enumerate(chunks)]
        builder.finish(entries, {"summary.json": ['{"rows": ', "10}"]}, {"aspects": ["A"]})
    return folder


@pytest.fixture
def corpus(tmp_path, records):
    return build(tmp_path / "corpus", records)


def test_read_back(corpus, records):
    reader = CorpusReader(corpus)
    assert len(reader) == 10
    assert list(reader) == records
    assert reader.batch([9, 0, 9, -1]) == [records[9], records[0], records[9], records[9]]
    assert reader.batch([]) == []
    assert pickle.loads(pickle.dumps(reader))[3] == records[3]
    assert reader.aspects == ("A",)
    assert reader.summary == {"rows": 10}
    assert [row.id for row in reader.index] == [record.id for record in records]
    assert [row.image_sha256 for row in reader.index] == [record.image_sha256 for record in records]
    reader.verify()
    for index in (10, -11):
        with pytest.raises(IndexError):
            reader[index]


def test_tfds_opens_it(corpus, records):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(corpus).as_data_source("train")
    assert len(source) == 10
    for record, example in zip(records, source, strict=True):
        assert example["id"].decode() == record.id
        assert [text.decode() for text in example["responses"]["text"]] == [r.text for r in record.responses]
        assert list(example["pairs"]["chosen"]) == [chosen for chosen, _ in record.pairs]
        expected = [Image.open(io.BytesIO(data)).size for data in record.images]
        assert [(array.shape[1], array.shape[0]) for array in example["images"]] == expected


def test_same_records_give_same_bytes_and_any_cut_the_same_fingerprint(tmp_path, records, corpus):
    again = build(tmp_path / "again", records)
    assert {p.name: p.read_bytes() for p in corpus.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    cut_otherwise = CorpusReader(
        build(tmp_path / "cut", records, shards=12)
    )  # more shards than records: some are empty
    assert list(cut_otherwise) == records
    assert cut_otherwise.fingerprint == CorpusReader(corpus).fingerprint
    assert CorpusReader(build(tmp_path / "fewer", records[:9])).fingerprint != cut_otherwise.fingerprint


def test_the_index_is_rebuilt_where_absent_and_refused_where_foreign(corpus):
    index = CorpusReader(corpus).index
    path = corpus / "index.jsonl"
    lines = path.read_text().splitlines()
    path.unlink()
    assert CorpusReader(corpus).index == index
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match=r"index.jsonl does not belong"):
        _ = CorpusReader(corpus).index


def test_an_unfinished_corpus_is_refused_and_completed(tmp_path, records):
    folder = tmp_path / "corpus"
    with CorpusBuilder(folder, "toy", 2) as builder:
        builder.write(0, "first", records[:5], {})
    (folder / ".building" / "toy-train.array_record-00001-of-00002.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="unfinished: rerun"):
        CorpusReader(folder)
    written = (folder / "toy-train.array_record-00000-of-00002").stat().st_mtime_ns
    with CorpusBuilder(folder, "toy", 2) as builder:
        assert not list((folder / ".building").glob("*.tmp"))
        first = builder.finished(0, "first")
        assert first is not None
        assert first.shard.records == 5
        assert builder.finished(0, "another input") is None
        assert builder.finished(1, "second") is None
        builder.finish([first, builder.write(1, "second", records[5:], {})], {}, {})
    assert (folder / "toy-train.array_record-00000-of-00002").stat().st_mtime_ns == written
    assert list(CorpusReader(folder)) == records


def test_two_writers_of_one_shard_do_not_meet(tmp_path, records):
    """As a cluster may have it: the second writes the whole shard while the first is halfway through."""
    folder = tmp_path / "corpus"
    with CorpusBuilder(folder, "toy", 1) as builder:

        def halfway():
            yield from records[:5]
            entries.append(CorpusBuilder(folder, "toy", 1).write(0, "key", records, {}))
            yield from records[5:]

        entries: list = []
        entries.append(builder.write(0, "key", halfway(), {}))
        assert entries[0] == entries[1]
        assert builder.finished(0, "key") == entries[0]

        def broken():
            yield records[0]
            raise ValueError("the source ends here")

        with pytest.raises(ValueError, match="ends here"):
            builder.write(0, "key", broken(), {})
        assert not list((folder / ".building").glob("*.tmp"))
        builder.finish(entries[1:], {}, {"aspects": ["A"]})
    assert list(CorpusReader(folder)) == records


def test_a_disk_without_locks_is_called_that(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"lock cannot be locked \(Function not implemented\): use a local disk"):
        CorpusBuilder(tmp_path / "corpus", "toy", 1).__enter__()


def test_a_shard_that_changed_is_not_kept(tmp_path, records):
    folder = tmp_path / "corpus"
    with CorpusBuilder(folder, "toy", 1) as builder:
        builder.write(0, "key", records, {})
    shard = folder / "toy-train.array_record-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with CorpusBuilder(folder, "toy", 1) as builder:
        assert builder.finished(0, "key") is None


def test_shards_of_another_cut_are_removed(tmp_path, records):
    folder = tmp_path / "corpus"
    with CorpusBuilder(folder, "toy", 5) as builder:
        builder.write(0, "key", records, {})
    with CorpusBuilder(folder, "toy", 1) as builder:
        assert not list(folder.glob("toy-train*"))
        builder.finish([builder.write(0, "key", records, {})], {}, {})
    assert list(CorpusReader(folder)) == records


def test_what_the_builder_refuses(tmp_path, corpus):
    with pytest.raises(UserError, match="already holds a finished corpus"), CorpusBuilder(corpus, "toy", 1):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"), CorpusBuilder(tmp_path / "mine", "toy", 1):
        pass
    with pytest.raises(UserError, match="is a file"), CorpusBuilder(tmp_path / "mine" / "thesis.txt", "toy", 1):
        pass
    busy = CorpusBuilder(tmp_path / "busy", "toy", 1)
    with busy, pytest.raises(UserError, match="another process"), CorpusBuilder(tmp_path / "busy", "toy", 1):
        pass
    with pytest.raises(UserError, match="corpus name"):
        CorpusBuilder(tmp_path / "x", "../x", 1)
    with pytest.raises(UserError, match="shards"):
        CorpusBuilder(tmp_path / "x", "toy", 0)


def test_a_failing_stream_leaves_no_shard(tmp_path, records):
    def failing():
        yield records[0]
        raise OSError("no more")

    with CorpusBuilder(tmp_path / "corpus", "toy", 1) as builder:
        with pytest.raises(OSError, match="no more"):
            builder.write(0, "key", failing(), {})
        assert not list((tmp_path / "corpus").glob("toy-train*"))


def test_a_full_disk_is_one_line(tmp_path):
    """A limit on the size of files stands for the disk; it needs a process of its own."""
    code = """
import os, resource, signal, sys
import tensorflow_datasets
from silkie_jax.corpus import Record, Response
from silkie_jax.corpus.shards import CorpusBuilder
from silkie_jax.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    with CorpusBuilder(sys.argv[1], "toy", 1) as builder:
        records = (Record(str(n), (os.urandom(50_000),), "p", (Response("r"),)) for n in range(20))
        builder.write(0, "key", records, {})
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "corpus")]
    lines = subprocess.check_output(command, text=True).splitlines()
    assert len(lines) == 1
    assert "toy-train.array_record-00000-of-00001 cannot be written (write() failed: File too large" in lines[0]
    assert not list((tmp_path / "corpus").glob("toy-train*"))


def test_what_the_reader_refuses(tmp_path, corpus):
    with pytest.raises(UserError, match="there is no corpus at"):
        CorpusReader(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a corpus"):
        CorpusReader(tmp_path / "empty")
    manifest = corpus / "corpus.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:50])
    with pytest.raises(UserError, match="is damaged"):
        CorpusReader(corpus)
    manifest.write_text(json.dumps({**json.loads(whole), "format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        CorpusReader(corpus)
    manifest.write_text(whole)
    shard = next(corpus.glob("toy-train*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{shard.name} has {len(data) - 1} bytes instead of {len(data)}"):
        CorpusReader(corpus)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        CorpusReader(corpus)


def test_flipped_bytes_are_never_read_as_data(corpus, records):
    """Reading raises, or gives what was written (bytes that nothing uses); `verify` sees every flip."""
    shard = sorted(corpus.glob("toy-train*"))[1]
    whole = shard.read_bytes()
    refused = 0
    for position in range(0, len(whole), 641):
        shard.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        reader = CorpusReader(corpus)
        with pytest.raises(UserError, match=f"{shard.name} has changed"):
            reader.verify()
        try:
            assert list(reader) == records
        except UserError:
            refused += 1
    assert refused
