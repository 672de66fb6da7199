"""The images' features beside a corpus: what the frozen vision tower makes of each, computed once.

    CORPUS/features/KEY/identity.json      what they depend on: tower, dtype, preprocessing, images
    CORPUS/features/KEY/images.txt         SHA-256 of every image file, in the order of the features
    CORPUS/features/KEY/part-00000.bin     of 256 images, as the decoder takes them: [256 images, 256, width]
    CORPUS/features/KEY/null-mean.bin      of an image that shows nothing, where a loss needs it (null_image.py)

Training with `features: precomputed` then neither loads nor runs the tower. An image is there once, however many
records show it, in the order of its first record: what a row reads is one run of bytes, mapped and not decoded. One of
Qwen-VL-Chat takes 2.1 MB in bfloat16.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float
from tqdm import tqdm

from silkie_jax.checkpoints.folders import check_room
from silkie_jax.checkpoints.weights import load_model
from silkie_jax.corpus import CorpusReader
from silkie_jax.errors import UserError
from silkie_jax.hardware.distributed import together
from silkie_jax.hardware.kernel import sound_kernel
from silkie_jax.hardware.mesh import batch_shards, local_sequences, make_mesh, put, replicated, sharding_of
from silkie_jax.hardware.products import check_compute
from silkie_jax.models.qwen_vl.config import IMAGE_TOKENS, QwenVLConfig
from silkie_jax.models.qwen_vl.image import IMAGE_FORM, read_image
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.models.qwen_vl.null_image import NullImage, keep_null, null_features
from silkie_jax.nn.attention import Kernel
from silkie_jax.preference.forward import block_wrapper
from silkie_jax.preference.grid import round_up
from silkie_jax.scoring.fingerprints import checksums
from silkie_jax.scoring.settings import Settings, missing_parts, numerics
from silkie_jax.scoring.store import Identity, Store, replace_file

_AT_LEAST = 4  # images that a device encodes together


class FeatureStore(Store):
    """Features of `images` (SHA-256 of each file), [256, width] an image."""

    kind, what, suffix, part = "features", "image features", "bin", 256

    def __init__(self, corpus: Path, identity: Identity, images: Sequence[str], width: int, dtype: str):
        super().__init__(corpus, identity, len(images))
        self.images, self.shape, self.dtype = images, (IMAGE_TOKENS, width), jnp.dtype(dtype)

    def nbytes(self, images: int) -> int:
        """Of the features of so many images."""
        return images * self.shape[0] * self.shape[1] * self.dtype.itemsize

    def write(self, part: int, features: Float[np.ndarray, "N 256 W"]) -> None:
        """Stores the features of a part."""
        self.begin()
        replace_file(self.folder / "images.txt", "".join(f"{image}\n" for image in self.images).encode())
        self._write(self.path(part), features)

    def null_path(self, null: NullImage) -> Path:
        """The file of a null image's features."""
        return self.folder / f"{str(null).replace(' ', '-')}.bin"

    def write_null(self, null: NullImage, features: Float[np.ndarray, "N 256 W"]) -> None:
        """Stores the features of a null image, of each draw."""
        self._write(self.null_path(null), features)

    def _write(self, path: Path, features: Float[np.ndarray, "N 256 W"]) -> None:
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(np.ascontiguousarray(features, self.dtype).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def read(self, nulls: Sequence[NullImage] = ()) -> "StoredFeatures":
        """All of them, mapped: what is not used is not read.

        Raises:
          UserError: a part, or one of the null images, is missing or cut short.
        """
        self.check()
        files = {self.path(part): len(self.range(part)) for part in range(self.parts)}
        for path, images in (files | {self.null_path(null): null.draws for null in nulls}).items():
            size, found = self.nbytes(images), path.stat().st_size if path.exists() else None
            if found is None:
                raise UserError(f"{path} is missing, which the loss needs; run `silkie reference` with this config")
            if found != size:
                raise UserError(
                    f"{path}: damaged ({found} bytes instead of {size}); remove it and run `silkie reference` again"
                )
        return StoredFeatures(self)


class StoredFeatures:
    """Features by image file. Safe to share between threads."""

    def __init__(self, store: FeatureStore):
        self.folder, self.shape, self.dtype, self._null_path = store.folder, store.shape, store.dtype, store.null_path
        self._numbers = {image: number for number, image in enumerate(store.images)}
        # Bytes: NumPy maps no bfloat16.
        self._parts = [np.memmap(store.path(part), np.uint8, "r") for part in range(store.parts)]
        self._each, self._part = store.nbytes(1), store.part

    def __call__(self, image: bytes) -> Float[np.ndarray, "256 W"]:
        """Of an image file's bytes.

        Raises:
          KeyError: no record of the corpus has such an image.
        """
        part, place = divmod(self._numbers[hashlib.sha256(image).hexdigest()], self._part)
        found = self._parts[part][place * self._each : (place + 1) * self._each]
        return found.view(self.dtype).reshape(self.shape)

    def keep_nulls(self, config: Settings, model: QwenVL, mesh: Mesh) -> None:
        """Gives a model without its tower the features of the null images that the configuration's loss needs."""
        for null in config.encoded_null_images:
            values = np.fromfile(self._null_path(null), np.uint8).view(self.dtype).reshape(null.draws, *self.shape)
            where = replicated(mesh)
            keep_null(model, null, jax.make_array_from_callback(values.shape, where, values.__getitem__))


def compute_features(config: Settings) -> Path:
    """Computes what is missing of the features of a corpus's images and returns their folder.

    Nothing but the tower is loaded. What is done is kept; the same command continues.

    Raises:
      UserError: model or corpus is not sound, an image cannot be read, or the disk is too small.
    """
    main = jax.process_index() == 0
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with together():
        check_compute(config.compute, mesh)
        corpus = CorpusReader(config.corpus)
        where = partial(sharding_of, mesh)
        model = load_model(
            config.model, dtype=config.dtype, sharding_of=where, parts=("visual",), quantize=config.codes
        )
        found = first_places(corpus)
    store = feature_store(config, corpus, checksums(model, jnp.dtype(config.dtype)), list(found))
    missing = missing_parts(store)
    with together():
        if main:
            store.begin()
            check_room(store.folder, store.nbytes(sum(len(store.range(part)) for part in missing)))
    kernel = sound_kernel(config.attention, config.dtype, mesh, say=print if main else lambda line: None)
    at_once = max(config.batch_rows, _AT_LEAST * batch_shards(mesh))  # an image takes less than a row
    encoder = Encoder(model, mesh, kernel, at_once, config.workers)
    places = list(found.values())
    with tqdm(
        total=sum(len(store.range(part)) for part in missing), desc="features", unit="image", disable=not main
    ) as bar:
        for part in missing:
            values = []
            for some in encoder(corpus, [places[number] for number in store.range(part)]):
                values.append(some)
                bar.update(len(some))
            with together():
                if main:
                    store.write(part, np.concatenate(values))
    graph, state = nnx.split(model)
    for null in config.encoded_null_images:  # at the most a few: computed anew where they are there
        with together():
            encode = partial(_encode_null, graph, null=null)
            rows = np.asarray(jax.jit(encode, out_shardings=replicated(mesh))(state))
            if main:
                store.write_null(null, rows)
    return store.folder


def _encode_null(graph: nnx.GraphDef, state: nnx.State, null: NullImage) -> Float[Array, "N 256 W"]:
    return null_features(nnx.merge(graph, state), null)


def find_features(config: Settings, corpus: CorpusReader, tower: bytes) -> StoredFeatures:
    """The stored features of exactly this corpus's images, by a tower of these `checksums`.

    Raises:
      UserError: there are none, or those there are another's; then the line says what differs.
    """
    return feature_store(config, corpus, tower, list(first_places(corpus))).read(config.encoded_null_images)


def feature_store(config: Settings, corpus: CorpusReader, tower: bytes, images: Sequence[str]) -> FeatureStore:
    """Where the features of these images lie."""
    model = QwenVLConfig.from_folder(config.model)
    identity = numerics(config) | {
        "tower": hashlib.sha256(tower).hexdigest(),
        "dtype": config.dtype,
        "preprocessing": f"{IMAGE_FORM}, {model.visual.image_size} pixels",
        "images": hashlib.sha256("".join(images).encode()).hexdigest(),
    }
    return FeatureStore(corpus.path, identity, images, model.visual.output_dim, config.dtype)


def first_places(corpus: CorpusReader) -> dict[str, tuple[int, int]]:
    """SHA-256 of every image file of a corpus -> the first record that shows it, and its number there."""
    found: dict[str, tuple[int, int]] = {}
    for record, row in enumerate(corpus.index):
        for number, image in enumerate(row.image_sha256):
            found.setdefault(image, (record, number))
    return found


class Encoder:
    """A compiled tower over batches of images, split over the mesh as rows are; a host decodes those of its devices."""

    def __init__(self, model: QwenVL, mesh: Mesh, kernel: Kernel, at_once: int, workers: int):
        self._mesh, self._workers, self._side = mesh, workers, model.config.visual.image_size
        self._count = round_up(at_once, batch_shards(mesh))
        graph, self._state = nnx.split(model)

        @partial(jax.jit, out_shardings=replicated(mesh))
        def encode(state: nnx.State, images: jax.Array) -> jax.Array:
            return nnx.merge(graph, state).encode_images(images[0], block_wrapper("none", mesh), kernel)[:, 0]

        self._encode = encode

    def __call__(
        self, corpus: CorpusReader, places: Sequence[tuple[int, int]]
    ) -> Iterator[Float[np.ndarray, "N 256 W"]]:
        """Features of the images at these places (record, number), some after others in their order."""
        import grain

        chunks = [places[first : first + self._count] for first in range(0, len(places), self._count)]
        options = grain.ReadOptions(num_threads=self._workers, prefetch_buffer_size=2 * self._workers)
        pixels: Iterable[np.ndarray] = (
            grain.MapDataset.source(chunks).map(partial(self._decode, corpus)).to_iter_dataset(options)
        )
        for chunk, images in zip(chunks, pixels, strict=True):
            found = self._encode(self._state, put({"images": images}, self._mesh)["images"])
            yield np.asarray(found)[: len(chunk)]

    def _decode(self, corpus: CorpusReader, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """[1, B, 1, S, S, 3], filled up with black."""
        out = np.zeros((1, self._count, 1, self._side, self._side, 3), np.uint8)
        local = local_sequences(self._mesh, self._count)
        files = corpus.images([record for record, _ in places])
        for i, ((record, number), images) in enumerate(zip(places, files, strict=True)):
            if local[i]:
                name = f"corpus record {corpus.index[record].id!r}, image {number + 1}"
                out[0, i, 0] = read_image(images[number], self._side, name=name)
        return out
