"""Files of pictures, drawn here: good, odd and hostile ones, with what becomes of each."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIZE = 24


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def gradient(width=SIZE, height=SIZE, seed=0):
    """A smooth picture, so that JPEG keeps it within a few grey levels."""
    y, x = np.mgrid[:height, :width]
    channels = [y * 255 // height, x * 255 // width, np.full_like(x, 40 * seed % 256)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def _chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png_header(width, height, bits=8, color=2):
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    data = _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(data) + _chunk(b"IEND", b"")


def _declared(form, width, height):
    """A small file of a form that declares this size."""
    content = bytearray(encoded(gradient(), form, **({"lossless": True} if form == "WEBP" else {})))
    if form == "GIF":
        content[6:10] = struct.pack("<HH", width, height)
    elif form == "BMP":
        content[18:26] = struct.pack("<ii", width, height)
    elif form == "JPEG":
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = struct.pack(">HH", height, width)
    elif form == "WEBP":  # 14 bits of width - 1, then of height - 1, after VP8L's signature
        bits = int.from_bytes(content[21:25], "little") >> 28 << 28
        content[21:25] = (bits | (height - 1) << 14 | (width - 1)).to_bytes(4, "little")
    return bytes(content)


def _frames(form):
    others = [gradient(seed=i) for i in (2, 3)]
    return encoded(gradient(), form, save_all=True, append_images=others, duration=50)


def _jpeg_with(between, number, *, progressive=False):
    """A JPEG with so many of these bytes after its start, or of its last scan."""
    content = encoded(gradient(), "JPEG", progressive=progressive)
    if progressive:
        between = content[content.rindex(b"\xff\xda") : -2]
    at = len(content) - 2 if progressive else 2
    return content[:at] + between * number + content[at:]


def _gif_with(between, number):
    """A GIF with so many of these bytes before its picture."""
    content = encoded(gradient(), "GIF")
    at = content.index(b",", 13 + 3 * 2 ** ((content[10] & 7) + 1))
    return content[:at] + between * number + content[at:]


def _segment(marker, content=b""):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def _many_parts(more):
    """Files with as many parts as are read, and `more` of each."""
    empty, pixel = _chunk(b"teXt", b""), _chunk(b"IDAT", b"")
    png = encoded(gradient())
    data = png.index(b"IDAT") - 4
    num_chunks = sum(png.count(kind) for kind in (b"IHDR", b"IEND"))
    exif = _segment(0xE1, b"Exif\0\0" + bytes(100))
    return {
        "exif.jpg": _jpeg_with(exif, 16 + more),
        "comments.jpg": _jpeg_with(_segment(0xFE), 1024 - 9 + more),
        "stray.jpg": _jpeg_with(b"\xff", 1024 + more),
        "restarts.jpg": _jpeg_with(b"\xff\xd0", 512 + more),
        "scans.jpg": _jpeg_with(b"", 90 + more, progressive=True),
        "chunks.png": png[:33] + empty * (1024 - num_chunks + more) + png[33:],
        "pixels.png": png[:data] + pixel * ((1 << 14) - 1 + more) + png[data:],
        "comments.gif": _gif_with(b"!\xfe\0", 1024 + more),
        "blocks.gif": _gif_with(b"!\xfe" + b"\1a" * ((1 << 12) + more) + b"\0", 1),
        "stray.gif": _gif_with(b"x", 1024 + more),
    }


def _deep(color):
    """16 bits a channel: grey or RGB."""
    y, x = np.mgrid[:SIZE, :SIZE]
    values = (y * 2000 + x * 300).astype(">u2")
    if not color:
        return encoded(Image.fromarray(values.astype(np.uint16)))
    rows = np.repeat(values[..., None], 3, -1).reshape(SIZE, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, 2, 0, 0, 0)
    chunks = _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(data)), _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def grey16():
    y, x = np.mgrid[:SIZE, :SIZE]
    return ((y * 2000 + x * 300) >> 8).astype(np.uint8)


def _rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    return encoded(gradient(), exif=exif)


def _half_transparent():
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[:, : SIZE // 2] = (255, 0, 0, 255)
    return encoded(Image.fromarray(pixels))


_PNG = encoded(gradient())
DECODED = {  # the name that the file gets, and its content
    "plain.png": _PNG,
    "photo.jpg": encoded(gradient(), "JPEG", quality=95),
    "stereo.jpg": encoded(
        gradient(), "MPO", save_all=True, append_images=[gradient(seed=2)], quality=95
    ),
    "one.webp": encoded(gradient(), "WEBP", lossless=True),
    "bitmap.bmp": encoded(gradient(), "BMP"),
    "wrong.gif": _PNG,  # the content decides
    "no extension": _PNG,
    "deep_grey.png": _deep(color=False),
    "deep.png": _deep(color=True),
    "palette.png": encoded(gradient().quantize(64)),
    "still.gif": encoded(gradient(), "GIF"),
    "cmyk.jpg": encoded(gradient().convert("CMYK"), "JPEG", quality=95),
    "bits.png": encoded(gradient().convert("1")),
    "transparent.png": _half_transparent(),
    "rotated.png": _rotated(),
    "wide.png": encoded(gradient(3 * SIZE, SIZE)),
    "dot.png": encoded(gradient(1, 1)),
    "progressive.jpg": encoded(gradient(), "JPEG", quality=95, progressive=True),
}
SKIPPED = {
    "huge.png": (png_header(60_000, 60_000), "picture_too_large"),
    "large.png": (png_header(10_000, 4_000), "picture_too_large"),
    "strip.png": (png_header(20_000, 1), "picture_too_large"),
    "column.png": (png_header(1, 20_000), "picture_too_large"),
    "negative.png": (png_header(2**32 - 1, 2**32 - 1), "picture_too_large"),
    "huge.gif": (_declared("GIF", 65_535, 65_535), "picture_too_large"),
    "huge.bmp": (_declared("BMP", 2**30, 2**30), "picture_too_large"),
    "huge.jpg": (_declared("JPEG", 65_500, 65_500), "picture_too_large"),
    "huge.webp": (_declared("WEBP", 16_383, 16_383), "picture_too_large"),
    "truncated.png": (_PNG[: len(_PNG) // 2], "damaged_picture"),
    "truncated.jpg": (encoded(gradient(), "JPEG")[:400], "damaged_picture"),
    "short.png": (png_header(SIZE, SIZE), "damaged_picture"),
    "no_colour.png": (png_header(SIZE, SIZE, color=7), "no_known_picture"),
    "moving.gif": (_frames("GIF"), "animated_picture"),
    "moving.png": (_frames("PNG"), "animated_picture"),
    "moving.webp": (_frames("WEBP"), "animated_picture"),
    "empty.png": (b"", "no_known_picture"),
    "text.png": (b"this is no picture at all", "no_known_picture"),
    "page.jpg": (b"<html><body>404</body></html>", "no_known_picture"),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no_known_picture"),
    "printed.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no_known_picture"),
    **{name: (content, "too_many_parts") for name, content in _many_parts(1).items()},
    "scan.tif": (encoded(gradient(), "TIFF"), "no_known_picture"),
}
MANY_PARTS = _many_parts(0)
