"""Image reading: bit-equal to the official preprocessing, and safe with any file."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.image import read_image


def noise(width, height, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image, form="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_golden_images_are_bit_equal(golden):
    arrays = np.load(golden / "inputs_outputs.npz")
    resized = arrays["vision/resized_uint8"]
    paths = sorted((golden / "images").iterdir())
    for path, expected in zip(paths, resized, strict=True):
        pixels = read_image(path, resized.shape[1])
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, expected)
        np.testing.assert_array_equal(read_image(path.read_bytes(), resized.shape[1]), expected)
        rgb = arrays[f"image_rgb/images/{path.name}"]
        if rgb.shape[0] == rgb.shape[1]:  # at its own size nothing is resampled
            np.testing.assert_array_equal(read_image(str(path), rgb.shape[0]), rgb)


def test_photographs(photos):
    for path in sorted(photos.glob("*.jp*g")):
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB").resize((448, 448), Image.BICUBIC))
        np.testing.assert_array_equal(read_image(path, 448), expected)


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGB", "JPEG"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("RGB", "PPM"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "JPEG"),
        ("YCbCr", "JPEG"),
        ("CMYK", "TIFF"),
        ("LAB", "TIFF"),
        ("I;16", "PNG"),
        ("F", "TIFF"),
    ],
)
def test_every_mode_is_what_pillow_makes_of_it(mode, form):
    if mode == "I;16":
        image = Image.fromarray(np.arange(30 * 20, dtype=np.uint16).reshape(20, 30))
    else:
        source = Image.fromarray(noise(30, 20))
        image = source.convert("P") if mode == "P" else source.convert("L" if mode == "F" else "RGB")
        image = Image.new(mode, (30, 20), 90) if mode == "LAB" else image.convert(mode)
    data = encoded(image, form)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(opened.convert("RGB").resize((14, 14), Image.BICUBIC))
    np.testing.assert_array_equal(read_image(data, 14), expected)


def test_transparency_is_dropped_and_exif_orientation_ignored():
    pixels = noise(24, 16)
    clear = np.dstack([pixels, np.zeros((16, 24), np.uint8)])
    data = encoded(Image.fromarray(clear))
    np.testing.assert_array_equal(read_image(data, 8), read_image(encoded(Image.fromarray(pixels)), 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    turned = encoded(Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(read_image(turned, 8), read_image(encoded(Image.fromarray(pixels)), 8))


def test_the_first_of_several_frames_is_read():
    for form in ("MPO", "TIFF"):  # MPO: a JPEG with more pictures behind it, as telephones write
        first, second = Image.fromarray(noise(24, 16)), Image.new("RGB", (24, 16))
        data = encoded(first, form, save_all=True, append_images=[second])
        with Image.open(io.BytesIO(data)) as opened:
            assert opened.format == form
            expected = np.asarray(opened.convert("RGB").resize((8, 8), Image.BICUBIC))
        np.testing.assert_array_equal(read_image(data, 8), expected)
        assert expected.any()


def gigantic_png(width: int, height: int) -> bytes:
    """A few bytes that claim to be a picture of any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 30_000])
def test_a_gigantic_image_is_refused(side):
    with pytest.raises(UserError, match=r"^img/big\.png: .*pixels"):
        read_image(gigantic_png(side, side), 8, name="img/big.png")


def test_the_limit_can_be_set():
    data = encoded(Image.fromarray(noise(20, 10)))
    assert read_image(data, 4, max_pixels=200).shape == (4, 4, 3)
    with pytest.raises(UserError, match="20 x 10 pixels are more than the limit of 199"):
        read_image(data, 4, max_pixels=199)


def test_a_bad_file_is_named_in_one_line(tmp_path):
    photo = encoded(Image.fromarray(noise(200, 100)), "JPEG")
    png = encoded(Image.fromarray(noise(200, 100)))
    for name, data in {
        "truncated.jpg": photo[: len(photo) // 2],
        "truncated.png": png[: len(png) // 2],
        "flipped.png": png[:100] + bytes([png[100] ^ 255]) + png[101:],
        "header.jpg": photo[:40],
        "text.jpg": b"<html>404</html>",
        "empty.png": b"",
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    }.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            read_image(path, 8)
        assert str(caught.value).startswith(f"{path}: "), name
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=r"^record 7: "):
            read_image(data, 8, name="record 7")
    with pytest.raises(UserError, match=r"absent\.png: .*No such file"):
        read_image(tmp_path / "absent.png", 8)
    with pytest.raises(UserError, match="directory"):
        read_image(tmp_path, 8)
