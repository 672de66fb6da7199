"""The generated rows that the quickstart and other tests stand on."""

import json

from PIL import Image

from data_prep.tables.vlfeedback import import_vlfeedback
from examples.tiny_vlfeedback import EXIF_ORIENTATION, FILES, make_rows
from silkie_jax.corpus import CorpusReader
from silkie_jax.corpus.pairs import pairs


def test_the_same_seed_gives_the_same_files(tmp_path):
    first, again, other = (make_rows(tmp_path / name, 12, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    for image in (tmp_path / "a/merged_images").iterdir():
        assert image.read_bytes() == (tmp_path / "b/merged_images" / image.name).read_bytes()


def test_files_are_mixed_as_promised(tmp_path):
    rows = [json.loads(line) for line in make_rows(tmp_path, 40).open(encoding="utf-8")]
    found, sizes = set(), set()
    for row in rows:
        with Image.open(tmp_path / row["img_path"]) as image:
            assert image.format == {"jpg": "JPEG", "png": "PNG"}[row["img_path"][-3:]]
            found.add((row["img_path"][-3:], image.mode, image.getexif().get(EXIF_ORIENTATION, 1)))
            sizes.add(image.size)
    assert found == set(FILES)
    assert len(sizes) > 4


def test_every_row_is_usable_and_better_ratings_mean_truer_words(tmp_path):
    summary = import_vlfeedback(make_rows(tmp_path, 40), tmp_path, tmp_path / "corpus", progress=False)
    assert summary.records == 40
    assert summary.missing_ratings == 4
    assert not summary.rejected
    for record in CorpusReader(tmp_path / "corpus"):
        found = pairs(record, "mean_rating")
        assert 3 <= len(found) <= 6  # a missing rating costs three pairs, a tie one
        for chosen, rejected in found:
            texts = record.responses[chosen].text, record.responses[rejected].text
            assert not (texts[0].startswith("Well") and texts[1].startswith("A "))
