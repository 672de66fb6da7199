"""Images are found by name only inside what was given, and stored only if they can be decoded."""

import ast
import io
import stat
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

import data_prep
import silkie_jax
from data_prep.tables.archives import images_of_rows, open_images
from data_prep.tables.images import check_image
from data_prep.tables.rejections import Rejected
from silkie_jax.errors import UserError
from tests.data_prep.conftest import encode, lock


@pytest.mark.parametrize(
    ("format", "mode"),
    [
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
        ("MPO", "RGB"),
    ],
)
def test_jpeg_and_png_are_stored_as_they_are(format, mode):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees; the official preprocessing does not look
    data = encode(format, mode=mode, exif=exif)
    assert check_image(data) == data


@pytest.mark.parametrize("format", ["WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_other_formats_become_a_png_of_the_same_pixels(format):
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(format, colour=(10, 200, 30), **options)
    stored = check_image(data)
    image = Image.open(io.BytesIO(stored))
    assert (image.format, image.mode) == ("PNG", "RGB")
    assert image.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    stored = Image.open(io.BytesIO(check_image(file.getvalue())))
    assert stored.getpixel((0, 0))[0] > 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        encode()[:-20],
        encode()[:100],
        encode("PNG")[:-30],
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"<svg/>",
    ],
)
def test_unreadable(data):
    with pytest.raises(Rejected, match="unreadable image"):
        check_image(data)


def test_a_flipped_byte_in_a_png_is_noticed():
    data = bytearray(encode("PNG"))
    data[len(data) // 2] ^= 255
    with pytest.raises(Rejected, match="unreadable image"):
        check_image(bytes(data))


def test_every_image_is_opened_by_the_table_of_formats():
    """Without it, Pillow starts Ghostscript for an EPS file."""
    found = []
    for path in (*Path(silkie_jax.__file__).parent.rglob("*.py"), *Path(data_prep.__file__).parent.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "Image.open":
                formats = {ast.unparse(word.value) for word in call.keywords if word.arg == "formats"}
                found.append((path.name, formats))
    assert found
    assert all(formats <= {"FORMATS", "STORED"} and formats for _, formats in found), found


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_gigantic_images_are_refused_before_they_are_decoded():
    with pytest.raises(Rejected, match="image too large: 32 x 24 pixels are more than 767"):
        check_image(encode(), max_pixels=767)
    assert check_image(encode(), max_pixels=768)
    bomb = bytearray(encode("PNG", mode="1", size=(64, 64)))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # the header claims 3.6 gigapixels
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(Rejected, match="image too large"):
        check_image(bytes(bomb))
    with pytest.raises(Rejected, match="image too large"):  # Pillow only warns of this one
        check_image(encode("PNG", mode="1", size=(10_000, 9_000)))


def make_zip(path, names, **entry):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = entry.get("attributes", stat.S_IFREG | 0o644) << 16
            archive.writestr(info, entry.get("data", encode()))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_look_up(tmp_path, kind):
    names = ["merged_images/a.1.jpg", "merged_images/b.png", "x/c.jpg", "y/c.jpg", "d.jpeg"]
    for name in names:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        for name in names:
            archive.writestr(name, name)
    images = open_images(tmp_path / kind)
    assert not images.refused
    assert images.find("merged_images/b.png") == "merged_images/b.png"  # the path itself
    assert images.find("./merged_images//b.png") == "merged_images/b.png"
    assert images.find("elsewhere/b.png") == "merged_images/b.png"  # the file name
    assert images.find("", "a.1") == "merged_images/a.1.jpg"  # the id with any suffix
    assert images.find("elsewhere/unknown.jpg", "merged_images/b") == "merged_images/b.png"
    assert images.find("x/c.jpg", "d") == "x/c.jpg"
    assert [images.has(id) for id in ("d", "e", "")] == [True, False, False]
    assert images.read("x/c.jpg") == b"x/c.jpg"
    assert images.stamp("x/c.jpg") != images.stamp("d.jpeg")
    with pytest.raises(Rejected, match=r"ambiguous: c.jpg could be x/c.jpg, y/c.jpg"):
        images.find("c.jpg")
    with pytest.raises(Rejected, match=r"image not found: nothing.jpg among"):
        images.find("nothing.jpg", "nothing")
    images.close()


@pytest.mark.parametrize(
    "name", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "..\\x.jpg", "C:\\x.jpg", "c:/x.jpg", "\\\\host\\x.jpg", ".."]
)
def test_paths_that_point_outside(tmp_path, name):
    (tmp_path / "x.jpg").write_bytes(encode())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.jpg").write_bytes(encode())
    for images in (open_images(tmp_path / "folder"), open_images(make_zip(tmp_path / "z.zip", ["x.jpg", name]))):
        with pytest.raises(Rejected, match="image path points outside"):
            images.find(name, "x")
    assert list(images.refused.values()) == ["points outside"]  # the zip's own entry


def test_a_name_cut_by_a_null_byte(tmp_path):
    with pytest.raises(Rejected, match="points outside"):
        open_images(tmp_path).find("x.jpg\0.png")


def test_links_in_a_zip_are_refused(tmp_path):
    images = open_images(
        make_zip(tmp_path / "z.zip", ["link.jpg"], attributes=stat.S_IFLNK | 0o777, data=b"/etc/passwd")
    )
    assert images.refused == {"link.jpg": "a link"}
    with pytest.raises(Rejected, match=r"image refused: link.jpg: a link"):
        images.find("link.jpg")


def test_links_that_leave_the_folder_are_refused(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(encode())
    (tmp_path / "outside").mkdir()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "real.jpg").write_bytes(encode())
    (folder / "inside.jpg").symlink_to("real.jpg")
    (folder / "leaves.jpg").symlink_to("../secret.jpg")
    (folder / "leaves").symlink_to("../outside")
    (folder / "broken.jpg").symlink_to("nothing.jpg")
    images = open_images(folder)
    assert set(images.refused) == {"leaves.jpg", "leaves"}
    assert images.read(images.find("inside.jpg")) == encode()
    for name in ("leaves.jpg", "broken.jpg"):
        with pytest.raises(Rejected):
            images.find(name)


def test_a_folder_that_cannot_be_listed_is_refused_and_the_others_go_on(tmp_path, monkeypatch):
    for name in ("good", "locked"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.jpg").write_bytes(encode())
    lock(monkeypatch, "locked")
    images = open_images(tmp_path)
    assert images.refused == {"locked": "cannot be looked at (Permission denied)"}
    assert images.names == ["good/good.jpg"]
    with pytest.raises(UserError, match=r"locked: the image folder cannot be read \(Permission denied\)"):
        open_images(tmp_path / "locked")


def test_images_beside_rows(tmp_path, monkeypatch):
    """By the rows' paths, by file names and ids in the rows' own folder; nothing else is looked at."""
    folder = tmp_path / "rows"
    for name in ("a.jpg", "below/b.jpg", "locked/secret.jpg", "c.txt", "5.jsonl", "7.PNG"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (tmp_path / "outside.jpg").write_bytes(encode())
    (folder / "leaves.jpg").symlink_to("../outside.jpg")
    (folder / "broken.jpg").symlink_to("nothing.jpg")
    (folder / "out").symlink_to("..")
    lock(monkeypatch, "locked")
    for rows in (folder, folder / "rows.jsonl"):
        images = images_of_rows(rows)
        assert not images.refused
        assert images.names == ["7.PNG", "a.jpg"]
        assert images.find("a.jpg") == images.find("./a.jpg") == images.find("elsewhere/a.jpg") == "a.jpg"
        assert images.find("below/b.jpg") == "below/b.jpg"
        assert images.read("below/b.jpg") == b"below/b.jpg"
        assert images.stamp("below/b.jpg").startswith("11-")
        assert images.find("c.txt") == "c.txt"  # the row says so
        assert (images.has("7"), images.has("5"), images.has("b")) == (True, False, False)
        for path in ("b.jpg", "broken.jpg", "below", "below/b.jpg/c", "x" * 5000):
            with pytest.raises(Rejected, match=r"image (not found|refused)"):
                images.find(path)
        for path in ("leaves.jpg", "out/outside.jpg"):
            with pytest.raises(Rejected, match=r"image refused: .* a link that leaves the folder"):
                images.find(path)
        with pytest.raises(Rejected, match="points outside"):
            images.find("../outside.jpg")


def test_other_hostile_zips(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns about the duplicate that is wanted here
        path = make_zip(tmp_path / "twice.zip", ["a.jpg", "a.jpg"])
    assert "a second entry" in open_images(path).refused["a.jpg"]

    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(10_000_000))
    with pytest.raises(Rejected, match=r"bomb.jpg has more than 100000 bytes"):
        open_images(tmp_path / "bomb.zip", max_bytes=100_000).read("bomb.jpg")

    data = bytearray(make_zip(tmp_path / "crc.zip", ["a.jpg"]).read_bytes())
    data[100] ^= 255  # inside the stored file
    (tmp_path / "crc.zip").write_bytes(data)
    with pytest.raises(Rejected, match=r"unreadable image: a.jpg: Bad CRC"):
        open_images(tmp_path / "crc.zip").read("a.jpg")

    data = bytearray(make_zip(tmp_path / "locked.zip", ["a.jpg"]).read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1  # the listing says: encrypted
    (tmp_path / "locked.zip").write_bytes(data)
    assert open_images(tmp_path / "locked.zip").refused == {"a.jpg": "encrypted"}


def test_what_is_no_source_of_images(tmp_path):
    with pytest.raises(UserError, match="no image folder or zip at"):
        open_images(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="neither a folder nor a readable zip"):
        open_images(tmp_path / "text")
