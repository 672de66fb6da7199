"""Scenes as picture files: JPEG or PNG, drawn by Pillow."""

import io

from PIL import Image, ImageDraw, ImageFont

from examples.world.scenes import COLOURS, GROUNDS, SIDE, Box, Scene

_SCALE = 2  # edges are smoothed by drawing larger and scaling down
_INK, _BOARD = (20, 20, 20), (255, 255, 255)


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, SIDE pixels square."""
    image = Image.new("RGB", (SIDE * _SCALE, SIDE * _SCALE), GROUNDS[scene.ground])
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        _shape(pen, thing.shape, _scaled(thing.box), COLOURS[thing.colour])
    if scene.sign is not None:
        left, top, right, bottom = _scaled(scene.sign.box)
        pen.rectangle((left, top, right, bottom), fill=_BOARD, outline=_INK, width=3 * _SCALE)
        font = ImageFont.load_default(size=0.8 * (bottom - top))
        pen.text(((left + right) / 2, (top + bottom) / 2), scene.sign.word, fill=_INK, font=font, anchor="mm")
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def encode(scene: Scene) -> bytes:
    """The file of a scene's picture in the scene's format."""
    file = io.BytesIO()
    if scene.format == "jpg":
        draw(scene).save(file, "JPEG", quality=90)
    else:
        draw(scene).save(file, "PNG")
    return file.getvalue()


def _scaled(box: Box) -> Box:
    left, top, right, bottom = (_SCALE * edge for edge in box)
    return (left, top, right, bottom)


def _shape(pen: ImageDraw.ImageDraw, shape: str, box: Box, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    match shape:
        case "circle":
            pen.ellipse(box, fill=colour)
        case "square":
            pen.rectangle(box, fill=colour)
        case "triangle":
            pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)
        case "cross":
            third, middle = (right - left) // 3, (bottom - top) // 3
            pen.rectangle((left, top + middle, right, bottom - middle), fill=colour)
            pen.rectangle((left + third, top, right - third, bottom), fill=colour)
        case _:
            raise ValueError(f"no such shape: {shape}")
