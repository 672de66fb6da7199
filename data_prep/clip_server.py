"""A small server of CLIP for sentence search and the `similarity` judge: `python -m data_prep.clip_server MODEL`.

It answers `POST /v1/similarity` with {"images": [data URL], "texts": [...]}: for each text 100 x the cosine between its
features and those of the first image, as {"data": [{"index", "similarity"}], "model", "usage"}. It needs the extra
`clip` (PyTorch and Transformers), which nothing else here does; any server that answers so is as good.
"""

import argparse
import base64
import binascii
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from silkie_jax.errors import UserError
from silkie_jax.image_limits import MAX_PIXELS, STORED

Similarity = Callable[[Image.Image, Sequence[str]], list[float]]
_MOST_BYTES = 64 * 2**20
_TOKENS = 77  # of a text that CLIP reads; what is longer is cut


def make_app(similarity: Similarity, name: str) -> Any:
    """The ASGI application over a function of an image and texts."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def answer(request: Request) -> JSONResponse:
        body = await request.body()
        try:
            image, texts = read_request(body)
        except UserError as error:
            return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error", "code": None}}, 400)
        values = await run_in_threadpool(similarity, image, texts)
        data = [{"index": index, "similarity": value} for index, value in enumerate(values)]
        return JSONResponse({"object": "list", "data": data, "model": name, "usage": {"total_tokens": 0}})

    return Starlette(routes=[Route("/v1/similarity", answer, methods=["POST"])])


def read_request(body: bytes) -> tuple[Image.Image, list[str]]:
    """The image and the texts of a request.

    Raises:
        UserError: one line that names the field and the mend. Nothing is fetched and no file opened.
    """
    if len(body) > _MOST_BYTES:
        raise UserError(f"a request may have {_MOST_BYTES:,} bytes")
    try:
        given = json.loads(body)
        images, texts = given["images"], given["texts"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError("the body must be a JSON object with images and texts") from None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError("texts must be a list of at least one text")
    if not isinstance(images, list) or not images:
        raise UserError("images must be a list of at least one data URL")
    link = images[0].get("url") if isinstance(images[0], dict) else images[0]
    kind, comma, data = link.partition(",") if isinstance(link, str) else ("", "", "")
    if not comma or not kind.startswith("data:image/") or not kind.endswith(";base64"):
        raise UserError("images[0] must be a data URL in base64: nothing is fetched")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=STORED)
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"images[0] has more than {MAX_PIXELS:,} pixels")
        return image.convert("RGB"), texts
    except (binascii.Error, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"images[0] is no JPEG or PNG that can be read ({error})") from None


def load_clip(model: str) -> Similarity:
    """CLIP by its name on the hub, or by its folder.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        import torch
        from transformers import CLIPModel, CLIPProcessor
    except ImportError as error:
        raise UserError(f"the CLIP server needs PyTorch: pip install 'silkie-jax[clip]' ({error})") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clip: Any = CLIPModel.from_pretrained(model, use_safetensors=True)
    clip.to(device).eval()
    processor = CLIPProcessor.from_pretrained(model)

    def similarity(image: Image.Image, texts: Sequence[str]) -> list[float]:
        options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": _TOKENS}
        inputs = processor(text=list(texts), images=image, **options).to(device)
        with torch.no_grad():
            found = clip(**inputs)
        cosines = found.text_embeds @ found.image_embeds.T  # both are normalised
        return [100 * float(value) for value in cosines[:, 0]]

    return similarity


def main() -> None:
    """Serves until it is ended."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="python -m data_prep.clip_server", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model", help="a CLIP of the hub, such as openai/clip-vit-large-patch14-336, or a folder")
    parser.add_argument("--port", type=int, default=8100)
    args = parser.parse_args()
    try:
        app = make_app(load_clip(args.model), args.model)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
