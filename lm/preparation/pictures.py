"""Pictures of documents as pixels of one size: decoded by Pillow within bounds, or refused.

The format is read from the content, whatever the name says. Nothing is decoded before the file's
size, its parts, its declared width and height, and its frames are known. Pixels are sRGB as they
are stored: 16-bit ones lose their low byte, palettes and CMYK are converted, transparent ones lie
over a background, and a camera's orientation is applied; colour profiles are not.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.preparation import picture_parts
from lm.sources import Document, Picture, Skipped
from lm.storage import files as storage
from lm.storage.paths import BUCKETS, is_url

if TYPE_CHECKING:
    from PIL import Image

FITS = ("crop", "pad")
MAX_PIXELS = 1 << 25
_MAX_BYTES = 1 << 26  # of a file
_MAX_SIZE = 4096
_MAX_SIDE = 1 << 14  # of a picture: a resampled strip takes many times the memory of its pixels
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class Unreadable(ValueError):
    """A picture that is skipped, with the reason and what else helps the user."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class PictureFormat:
    """The pixels of a store: uint8 [size, size, 3].

    fit: "crop" fills the square and cuts what is beyond it, alike on both sides; "pad" has all of
    the picture, in the middle of the background. background: a colour of CSS, such as "#80ff00".
    max_pixels: of a picture that is decoded, by its declared width and height.
    """

    size: int
    fit: str = "crop"
    background: str = "white"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        from PIL import ImageColor

        if not 1 <= self.size <= _MAX_SIZE:
            raise ValueError(f"--image-size={self.size}: give a number from 1 to {_MAX_SIZE}")
        if self.fit not in FITS:
            raise ValueError(f"--image-fit={self.fit}: give one of {', '.join(FITS)}")
        if self.max_pixels < 1:
            raise ValueError(f"--image-max-pixels={self.max_pixels}: give a positive number")
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(f"--image-background={self.background} is no colour") from None

    def identity(self) -> dict[str, Any]:
        """Return all that pixels depend on beside the picture, as JSON."""
        import PIL

        return vars(self) | {"pillow": PIL.__version__}

    def convert(self, picture: Picture) -> Picture:
        """Return the picture as pixels. Raises Unreadable."""
        content = picture.content
        if isinstance(content, str):
            content = _read(content)
        if isinstance(content, bytes):
            content = self._decode(content)
        assert content.shape == (self.size, self.size, 3), "a source gives files, or these pixels"
        return picture._replace(content=content)

    def _decode(self, content: bytes) -> np.ndarray:
        from PIL import Image

        if len(content) > _MAX_BYTES:
            raise Unreadable("picture_too_large", f"{len(content):,} bytes")
        if found := picture_parts.excess(content):
            raise Unreadable("too_many_parts", found)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sizes, which are checked here
                with Image.open(BytesIO(content), formats=_FORMATS) as image:
                    return self._pixels(image)
        except (MemoryError, Unreadable):
            raise
        except Image.DecompressionBombError:
            raise Unreadable(
                "picture_too_large", "it declares more pixels than Pillow opens"
            ) from None
        except Image.UnidentifiedImageError:
            raise Unreadable("no_known_picture", f"not of {', '.join(_FORMATS)}") from None
        except Exception as error:  # decoders raise errors of many kinds for damaged files
            raise Unreadable("damaged_picture", _first_line(error)) from None

    def _pixels(self, image: Image.Image) -> np.ndarray:
        """Return the pixels of a picture of which the header is read."""
        from PIL import Image, ImageOps

        width, height = image.size
        if width * height > self.max_pixels or max(width, height) > _MAX_SIDE:
            raise Unreadable("picture_too_large", f"{width} x {height} pixels")
        # several pictures of a JPEG (MPO) are no animation: the first is the photograph
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise Unreadable("animated_picture")
        # a large JPEG is decoded at a half, a quarter or an eighth, at twice the final size or more
        image.draft("RGB", (2 * self.size, 2 * self.size))
        image = ImageOps.exif_transpose(image)
        image = self._flatten(image)
        width, height = image.size
        sides = min(width, height) if self.fit == "crop" else max(width, height)
        left, top = (width - sides) / 2, (height - sides) / 2
        if self.fit == "crop":
            box = (left, top, left + sides, top + sides)
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)
        else:
            scaled = [max(round(side * self.size / sides), 1) for side in (width, height)]
            image = image.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
            square = Image.new("RGB", (self.size, self.size), self.background)
            square.paste(image, ((self.size - scaled[0]) // 2, (self.size - scaled[1]) // 2))
            image = square
        return np.asarray(image)

    def _flatten(self, image: Image.Image) -> Image.Image:
        """Return a picture as RGB, with the background where it is transparent."""
        from PIL import Image

        if image.mode.startswith("I"):  # 16 bits of grey
            grey = np.asarray(image).astype(np.int64) >> 8
            return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")
        if image.mode == "F":
            raise Unreadable("no_known_picture", "of floating-point numbers")
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        square = Image.new("RGBA", image.size, self.background)
        return Image.alpha_composite(square, image).convert("RGB")


def _read(path: str) -> bytes:
    """Return the content of a picture's file. Raises Unreadable."""
    if "://" in path and path.partition("://")[0] not in BUCKETS:
        raise Unreadable("remote_picture", f"{path}: copy it to a disk or a bucket")
    if not is_url(path) and os.path.exists(path) and not os.path.isfile(path):
        raise Unreadable("no_picture", f"{path} is no file")
    try:
        if (size := storage.stat(path).size) > _MAX_BYTES:
            raise Unreadable("picture_too_large", f"{path}: {size:,} bytes")
        return storage.read_bytes(path)
    except FileNotFoundError:
        raise Unreadable("no_picture", f"no file {path}") from None
    except (OSError, ValueError) as error:
        if is_url(path) or isinstance(error, Unreadable):  # a bucket's answer says nothing of it
            raise
        raise Unreadable("no_picture", f"{path}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def captions(document: Document) -> list[Document]:
    """Return a document for each caption of a picture, all with the key of the first."""
    if document.picture is None or not document.picture.captions:
        return [document]
    [field] = document.fields
    picture, others = Picture(document.picture.content), enumerate(document.picture.captions, 1)
    first = document._replace(key=document.split_key, picture=picture)
    return [
        first,
        *(first._replace(id=f"{document.id}#{i}", fields={field: text}) for i, text in others),
    ]


def with_pixels(document: Document, wanted: PictureFormat) -> Document | Skipped:
    """Return a document with its picture as pixels, or why it is skipped."""
    if document.picture is None:
        return Skipped(document.id, "no_picture")
    try:
        return document._replace(picture=wanted.convert(document.picture))
    except Unreadable as error:
        path, detail = document.picture.content, error.detail
        if isinstance(path, str) and path not in detail:
            detail = f"{path}: {detail}" if detail else path
        return Skipped(document.id, error.reason, detail=detail)
