"""What image files are taken, everywhere: their formats, and how large they may be. This module imports nothing."""

MAX_PIXELS = 89_478_485
"""Default limit on width x height: Pillow's own threshold for suspecting a decompression bomb."""

MAX_BYTES = 64 * 2**20
"""Default limit on the size of an image file."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Raster formats only: Pillow would also start Ghostscript for an EPS file. JPEG includes MPO."""

STORED = ("JPEG", "PNG")
"""The formats that runs and corpora hold; images of the others become PNG."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")
"""What names of such files end in, in lower case."""
