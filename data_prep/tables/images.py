"""Image files from elsewhere: decoded once to see that they are whole, before they are stored."""

import io
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.tables.rejections import Rejected
from silkie_jax.image_limits import FORMATS, MAX_PIXELS, STORED

_STORED_AS_THEY_ARE = (*STORED, "MPO")  # MPO is JPEG with further pictures appended
_ORIENTATION = 0x0112  # of EXIF
_LARGE = 16_000_000  # pixels; images beyond are decoded one at a time, so that memory stays flat with many workers
_one_large_image = threading.Lock()

# `check_image` refuses by its own limit; Pillow would warn about the same images.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@contextmanager
def opened(data: bytes, *, max_pixels: float = MAX_PIXELS) -> Iterator[Image.Image]:
    """An image file of a known format whose pixels are decoded when they are first used.

    Raises:
        Rejected: unreadable (also when that turns out on the way), of an unknown format, or larger than `max_pixels`
            (found out before decoding).
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise Rejected("image too large", f"{width} x {height} pixels are more than {max_pixels}")
            yield image
    except Rejected:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("image too large", error) from error
    except UnidentifiedImageError as error:
        raise Rejected("unreadable image", f"not an image file of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # on damaged files Pillow's decoders raise many kinds, not only OSError
        raise Rejected("unreadable image", error or type(error).__name__) from error


def check_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """Decodes an image file to see that it is whole, and returns the bytes to store.

    JPEG and PNG are returned as they are, EXIF orientation and all: the official preprocessing does not apply it. Other
    formats become a PNG of the first frame in RGB, the pixels that the official code would see.

    Raises:
        Rejected: see `opened`.
    """
    with opened(data, max_pixels=max_pixels) as image, _room_for(image):
        if image.format in _STORED_AS_THEY_ARE:
            image.draft(None, (1, 1))  # JPEG: reads every bit but transforms at an eighth of the size
            image.load()
            return data
        png = io.BytesIO()
        image.convert("RGB").save(png, "PNG")
        return png.getvalue()


def _room_for(image: Image.Image) -> AbstractContextManager[object]:
    return _one_large_image if image.width * image.height > _LARGE else nullcontext()


def suffix(data: bytes) -> str:
    """What the name of a stored image file ends in."""
    return ".png" if data.startswith(b"\x89PNG") else ".jpg"


def upright(data: bytes) -> bytes:
    """A checked JPEG or PNG file as a viewer shows it: turned where its EXIF orientation says so, else as it is."""
    with opened(data, max_pixels=math.inf) as image:
        if image.getexif().get(_ORIENTATION, 1) not in range(2, 9):
            return data
        file = io.BytesIO()
        turned = ImageOps.exif_transpose(image)
        if image.format == "PNG":
            turned.save(file, "PNG")
        else:
            turned.save(file, "JPEG", quality=95)
        return file.getvalue()
