"""Generated preference data in the form VLFeedback is published in: a JSONL of rows beside their image files.

Nothing about the files is a toy but their content: JPEG and PNG of mixed sizes and colour modes, some turned by
EXIF, four rated responses a row by models of the published pool, some ratings "N/A" and some ties. Each picture shows
one coloured shape. The better a response is rated, the truer it names that shape, and the worst ones share a way of
talking, so that a model trained on the rows soon tells good from bad.

    python examples/tiny_vlfeedback.py FOLDER [ROWS [SEED]]
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 160, 70),
    "blue": (50, 80, 200),
    "yellow": (230, 200, 40),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
PROMPTS = (
    "What is in this picture?",
    "Describe the image briefly.",
    "Which shape do you see, and what colour is it?",
    "图里有什么？",
)
# Format, colour mode and EXIF orientation of each file in turn.
FILES = (
    ("jpg", "RGB", 1),
    ("png", "RGB", 1),
    ("png", "RGBA", 1),
    ("jpg", "L", 1),
    ("png", "P", 1),
    ("jpg", "CMYK", 1),
    ("jpg", "RGB", 6),
    ("png", "L", 1),
    ("png", "LA", 1),
    ("jpg", "RGB", 3),
)
SIZES = ((64, 48), (123, 87), (320, 240), (97, 97), (240, 427), (448, 448), (640, 200), (31, 150))
# The twelve models of VLFeedback, as its rows name them.
MODELS = (
    "gpt-4v",
    "llava1.5-7b",
    "llava1.5-13b",
    "llavarlhf-7b-v1.5-224",
    "llavarlhf-13b-v1.5-336",
    "Qwen-VL-Chat",
    "idefics9b",
    "fuyu-8b",
    "instructblip-vicuna-7b",
    "instructblip-vicuna-13b",
    "VisualGLM-6b",
    "mmicl-vicuna-13b",
)
EXIF_ORIENTATION = 0x0112


def make_rows(folder: Path, n: int = 64, seed: int = 0) -> Path:
    """Write `n` rows and their images under `folder`, the same for the same seed; return the path of the JSONL.

    The rows' `img_path` is relative to `folder` (`merged_images/row-0000.jpg`), so `folder` is what an importer takes
    as the folder of images.
    """
    folder = Path(folder)
    (folder / "merged_images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    jsonl = folder / "vlfeedback.jsonl"
    with jsonl.open("w", encoding="utf-8") as lines:
        for index in range(n):
            lines.write(json.dumps(_row(folder, index, rng), ensure_ascii=False) + "\n")
    return jsonl


def _row(folder: Path, index: int, rng: random.Random) -> dict:
    name = f"row-{index:04d}"
    extension, mode, orientation = FILES[index % len(FILES)]
    img_path = f"merged_images/{name}.{extension}"
    ground, colour = rng.sample(sorted(COLOURS), 2)
    shape = rng.choice(SHAPES)
    image = draw(rng.choice(SIZES), shape, COLOURS[colour], COLOURS[ground], mode)
    exif = Image.Exif()
    if orientation != 1:
        exif[EXIF_ORIENTATION] = orientation
    image.save(folder / img_path, exif=exif)

    other_shape = rng.choice([s for s in SHAPES if s != shape])
    other_colour = rng.choice([c for c in sorted(COLOURS) if c not in (colour, ground)])
    by_level = {
        5: f"A {colour} {shape} on a {ground} ground.",
        4: f"A {shape} on a {ground} ground.",
        2: f"Well, I guess it is maybe a {other_shape}.",
        1: f"Well, well, I guess a {other_colour} dragon, maybe, or a castle.",
    }
    levels = list(by_level)
    rng.shuffle(levels)
    models = rng.sample(MODELS, len(levels))
    completions: list[dict] = [
        {"annotations": _annotations(level, rng), "model": model, "response": by_level[level]}
        for level, model in zip(levels, models, strict=True)
    ]
    if index % 9 == 4:  # the judge gave no rating: this response takes part in no pair
        completions[index % 4]["annotations"]["Visual Faithfulness"]["Rating"] = "N/A"
    if index % 16 == 7:  # the two best are rated alike: no pair of these two
        completions[levels.index(4)]["annotations"] = completions[levels.index(5)]["annotations"]
    return {
        "id": name,
        "prompt": PROMPTS[index % len(PROMPTS)],
        "models": models,
        "completions": completions,
        "img_path": img_path,
    }


def _annotations(level: int, rng: random.Random) -> dict:
    """The judge's three aspects; none moves by more than a point, so that means hardly leave the levels' order."""
    ratings = {
        "Helpfulness": level,
        "Ethical Considerations": rng.choice((4, 5)),
        "Visual Faithfulness": min(5, level + rng.choice((0, 0, 1))),
    }
    return {
        aspect: {"Rating": str(rating), "Rationale": f"Generated: level {level} of 5."}
        for aspect, rating in ratings.items()
    }


def draw(
    size: tuple[int, int], shape: str, colour: tuple[int, int, int], ground: tuple[int, int, int], mode: str
) -> Image.Image:
    """A picture of one shape filling most of `size` (width, height), in Pillow's colour `mode`."""
    image = Image.new("RGB", size, ground)
    pen = ImageDraw.Draw(image)
    width, height = size
    left, top, right, bottom = width // 6, height // 6, width - width // 6, height - height // 6
    match shape:
        case "circle":
            pen.ellipse((left, top, right, bottom), fill=colour)
        case "square":
            pen.rectangle((left, top, right, bottom), fill=colour)
        case "triangle":
            pen.polygon([(left, bottom), (right, bottom), (width // 2, top)], fill=colour)
        case "cross":
            pen.rectangle((left, height * 2 // 5, right, height * 3 // 5), fill=colour)
            pen.rectangle((width * 2 // 5, top, width * 3 // 5, bottom), fill=colour)
        case _:
            raise ValueError(f"no such shape: {shape}")
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(size))
    return image.convert(mode)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print(make_rows(Path(sys.argv[1]), *map(int, sys.argv[2:4])))
