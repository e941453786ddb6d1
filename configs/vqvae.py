"""VQ-VAE: pictures as grids of codes, for a decoder that draws them (configs/dalle.py).

    configs/vqvae.py:shapes    also emoji, imagenet, dalle

shapes (32 x 32 pixels to 8 x 8 of 128 codes, 0.2M parameters) learns synthetic:shapes in minutes on
two cores; emoji is the same with 256 codes, for drawings of emoji. docs/images.md has their errors
and pictures. imagenet is the model of the paper (arXiv:1711.00937, section 4.1): 128 x 128 pixels
to 32 x 32 of 512 codes, 256 channels, two residual blocks, Adam at 2e-4, 250,000 steps of 128
pictures, running averages of decay 0.99. dalle has the sizes of DALL-E's discrete VAE
(arXiv:2102.12092, section 2.1), 256 x 256 to 32 x 32 of 8,192 codes, which was trained with a
Gumbel relaxation and another encoder. The latter two were not run here.

    python scripts/train.py --config=configs/vqvae.py --workdir=runs/vqvae
    python scripts/train.py --config=configs/vqvae.py:imagenet --workdir=runs/imagenet \\
        --config.data.train="('data/imagenet/train',)"
"""

from lm.config.conversion import default

# image_size, num_halvings, num_layers, embed_dim, mlp_dim, num_codes, code_dim
SIZES = {
    "shapes": (32, 2, 1, 64, 32, 128, 16),
    "emoji": (32, 2, 1, 64, 32, 256, 16),
    "imagenet": (128, 2, 2, 256, 256, 512, 64),
    "dalle": (256, 3, 2, 256, 256, 8192, 128),
}


def get_config(arg=None):
    size = arg or "shapes"
    if size not in SIZES:
        raise ValueError(f"configs/vqvae.py:{size} is not a size; there are: {', '.join(SIZES)}")
    config = default(model="vqvae", objective="vqvae")
    names = "image_size num_halvings num_layers embed_dim mlp_dim num_codes code_dim"
    config.model.update(dict(zip(names.split(), SIZES[size], strict=True)))

    optimizer = config.optimizer
    optimizer.weight_decay = 0.0
    optimizer.b2 = 0.999
    optimizer.learning_rate = 2e-4
    optimizer.schedule.kind = "constant"

    if size in ("shapes", "emoji"):
        config.data.train = ("synthetic:shapes:65536:0:seen",)
        config.data.validation = ("synthetic:shapes:1024:1:held_out",)
        config.data.length = 48  # of captions, in bytes, which it doesn't read
        config.data.batch_size = 32
        config.objective.variance = 0.1
        optimizer.learning_rate = 2e-3
        optimizer.schedule.kind = "cosine"
        optimizer.schedule.warmup_steps = 20
        config.train.num_steps = 1000
        config.train.eval_every = 500
        if size == "emoji":
            config.data.train = ("data/google/train",)
            config.data.validation = ("data/google/validation",)
            config.data.length = 80
            config.train.num_steps = 1500
        return config

    config.data.train = ("data/imagenet/train",)
    config.data.validation = ("data/imagenet/validation",)
    config.data.length = 64
    config.data.batch_size = 128
    config.model.dtype = "bfloat16"
    config.train.num_steps = 250_000
    config.train.eval_every = 10_000
    return config
