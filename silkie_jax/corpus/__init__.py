"""What lies on disk: records, shards, pair rules and splits. Imports neither JAX nor TensorFlow."""

from silkie_jax.corpus.reader import CorpusReader, IndexRow
from silkie_jax.corpus.schema import Record, Response
from silkie_jax.corpus.splits import split

__all__ = ["CorpusReader", "IndexRow", "Record", "Response", "split"]
