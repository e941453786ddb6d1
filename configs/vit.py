"""Vision transformers (arXiv:2010.11929) that classify pictures.

    configs/vit.py:shapes    also s16, b32, b16, l16, h14

shapes (32 x 32 pixels, patches of 4, 0.2M parameters) names the colour and the shape of the first
of two objects in pictures of synthetic:shapes, 28 classes, and is tested on arrangements that are
in none of its training pictures; docs/images.md has its accuracy. It takes minutes on two cores.

The others are for ImageNet, whose 1,000 classes are the captions of a store (docs/images.md):
--config.objective.labels names them. B, L and H are those of the paper, and so are the numbers of
their training on ImageNet alone (table 3): 300 epochs of batches of 4,096, Adam at 3e-3, 10,000
steps of warmup, cosine, weight decay 0.3, dropout 0.1, gradients clipped at 1. S/16 is that of
arXiv:2205.01580, with its changes: no class token but the mean of all patches, sinusoidal
positions, batches of 1,024 at 1e-3, 90 epochs. None of these was trained here.

    python scripts/train.py --config=configs/vit.py --workdir=runs/vit
    python scripts/plan.py --config=configs/vit.py:l16 --config.data.batch_size=4096
"""

from lm.config.conversion import default
from lm.data.shapes import COLORS, SHAPES

# num_layers, embed_dim, num_heads, patch_size
SIZES = {
    "shapes": (4, 64, 4, 4),
    "s16": (12, 384, 6, 16),
    "b32": (12, 768, 12, 32),
    "b16": (12, 768, 12, 16),
    "l16": (24, 1024, 16, 16),
    "h14": (32, 1280, 16, 14),
}
IMAGENET = 1_281_167  # pictures


def get_config(arg=None):
    size = arg or "shapes"
    if size not in SIZES:
        raise ValueError(f"configs/vit.py:{size} is not a size; there are: {', '.join(SIZES)}")
    config = default(model="vit", objective="image_classification")
    names = "num_layers embed_dim num_heads patch_size"
    config.model.vision.update(dict(zip(names.split(), SIZES[size], strict=True)))

    optimizer = config.optimizer
    optimizer.clip_norm = 1.0
    optimizer.schedule.kind = "cosine"

    if size == "shapes":
        config.model.image_size = 32
        config.model.num_classes = len(COLORS) * len(SHAPES)
        config.objective.labels = tuple(
            f"a {color} {shape}" for color in COLORS for shape in SHAPES
        )
        config.data.train = ("synthetic:shapes:65536:0:seen",)
        config.data.validation = ("synthetic:shapes:1024:1:held_out",)
        config.data.length = 48  # of captions, in bytes
        config.data.batch_size = 64
        optimizer.learning_rate = 1e-3
        optimizer.b2 = 0.99
        optimizer.schedule.warmup_steps = 100
        config.train.num_steps = 1000
        config.train.eval_every = 250
        return config

    config.model.dtype = "bfloat16"
    config.objective.flip = True
    config.objective.crop = 0.05
    config.data.train = ("data/imagenet/train",)
    config.data.validation = ("data/imagenet/validation",)
    config.data.length = 64
    optimizer.schedule.warmup_steps = 10_000
    if size == "s16":
        config.model.vision.pooling = "mean"
        config.model.vision.positions = "sinusoidal"
        config.data.batch_size = 1024
        optimizer.learning_rate = 1e-3
        optimizer.weight_decay = 0.1
        config.train.num_steps = 90 * IMAGENET // 1024
    else:
        config.model.dropout = 0.1
        config.data.batch_size = 4096
        optimizer.learning_rate = 3e-3
        optimizer.weight_decay = 0.3
        config.train.num_steps = 300 * IMAGENET // 4096
    config.train.eval_every = 5_000
    return config
