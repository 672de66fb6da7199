"""Many threads may decode records of a corpus at once, from the first moment of a process."""

import subprocess
import sys

from silkie_jax.corpus import Record, Response
from silkie_jax.corpus.shards import CorpusBuilder

PROGRAM = """
import sys, threading
from silkie_jax.corpus import CorpusReader
corpus = CorpusReader(sys.argv[1])
together = threading.Barrier(8)
found = []
def read(n):
    together.wait()
    found.append(corpus[n].id)
threads = [threading.Thread(target=read, args=(n,), daemon=True) for n in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(*sorted(found))
"""


def test_the_first_records_of_a_process_may_be_decoded_by_many_threads(tmp_path):
    records = [Record(f"r{n}", (), "What?", (Response("This."),)) for n in range(8)]
    with CorpusBuilder(tmp_path / "corpus", "tiny", 1) as builder:
        builder.finish([builder.write(0, "key", records, {})], {}, {"aspects": []})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "corpus"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == [f"r{n}" for n in range(8)], done.stderr
