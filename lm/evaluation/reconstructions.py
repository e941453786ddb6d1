"""Pictures above what a VQ-VAE makes of them."""

from __future__ import annotations

import numpy as np

from lm.data.rows import RowSource
from lm.generation.pictures import grid_png
from lm.storage.files import write_atomically
from lm.training.picture_codes import PictureCoder

_COLUMNS, _BANDS = 8, 2


def write_reconstructions(path: str, coder: PictureCoder, source: RowSource) -> int:
    """Write a PNG of pictures from all over a source, each above its reconstruction, and return
    their number: 16, those of a source of fewer than 8, or 8.
    """
    columns = min(_COLUMNS, len(source))
    bands = min(_BANDS, len(source) // columns)
    numbers = np.linspace(0, len(source) - 1, bands * columns).round().astype(np.int64)
    images = source.read(numbers).images
    assert images is not None, "the layout of lm.objectives.vqvae has pictures"
    pairs = np.stack([images, coder.decode(coder.encode(images))])  # [2, n, height, width, 3]
    rows = pairs.reshape(2, bands, columns, *images.shape[1:]).swapaxes(0, 1)
    write_atomically(path, grid_png(rows.reshape(2 * bands, columns, *images.shape[1:])))
    return len(images)
