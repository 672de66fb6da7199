"""An image file as the model sees it: RGB, stretched to a square, uint8. Scaling to floats happens on the device."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from silkie_jax.errors import UserError
from silkie_jax.image_limits import FORMATS, MAX_PIXELS

IMAGE_FORM = "silkie-images-1"
"""Names what becomes of an image file before the model sees it. Changes with it, so that features which were stored
under an older form are recognised as such."""


def read_image(
    source: str | Path | bytes, size: int, *, max_pixels: int = MAX_PIXELS, name: str | None = None
) -> UInt8[np.ndarray, "S S 3"]:
    """Reads an image file, or its bytes, as uint8 [size, size, 3].

    Bit-equal to the official preprocessing with Pillow: `convert("RGB")` (transparency is dropped, 16-bit grey is
    clipped), then a stretch without crop by BICUBIC. EXIF orientation is not applied; of several frames the first is
    taken. `name` stands for the image in errors where `source` is bytes.

    Raises UserError for a file that is absent, truncated, of another format, or larger than `max_pixels` (which is
    found out before anything is decoded).
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    file = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UserError(f"{name}: {width} x {height} pixels are more than the limit of {max_pixels}")
            colour = image if image.mode == "RGB" else image.convert("RGB")
            return np.asarray(colour.resize((size, size), Image.Resampling.BICUBIC))
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image file of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # on damaged files Pillow's decoders raise many kinds, not only OSError
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{name}: cannot read the image ({' '.join(reason.split())})") from error
