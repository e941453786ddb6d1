"""CLIP and SigLIP: pictures and texts in one space, from pairs that belong together.

    configs/clip.py:shapes    also emoji, b32, l14, siglip_b16

shapes (32 x 32 pixels, captions in bytes) learns synthetic:shapes in minutes on two cores;
docs/images.md has its recall. emoji is trained on one vendor's drawings of emoji, and tested on
another's of other names; docs/images.md has the data, the commands and its recall. b32 and l14 are
CLIP's ViT-B/32 and ViT-L/14 (arXiv:2103.00020, tables 18 and 20: 32 epochs of 400M pairs at a batch
of 32,768), siglip_b16 SigLIP's B/16 at 224 (arXiv:2303.15343, section 4.3, trained there with an
Adafactor; here Adam with its b2). These three were compiled for absent chips (docs/images.md), and
not trained here.

    python scripts/train.py --config=configs/clip.py --workdir=runs/clip
    python scripts/plan.py --config=configs/clip.py:l14 --topology=v5p:4x4x4

Data of one's own needs a tokenizer and stores with pictures (docs/images.md), which the last
three expect at data/pairs.
"""

from lm.config.conversion import default

NAMES = ("num_layers", "embed_dim", "num_heads", "mlp_dim")
CLIP = {"activation": "quick_gelu", "norm_eps": 1e-5}
SIGLIP = {"activation": "gelu_tanh", "norm_eps": 1e-6}
SMALL = {"activation": "gelu_tanh", "norm_eps": 1e-6}
SHARED = ("embedding_dim", "image_size", "max_length", "vocab_size")
# of pictures: patch_size and NAMES; of texts: NAMES; SHARED
SIZES = {
    "shapes": ((4, 3, 64, 4, 128), (2, 64, 4, 128), 64, 32, 48, 264),
    "emoji": ((8, 3, 64, 4, 128), (2, 64, 4, 128), 64, 32, 64, 264),
    "b32": ((32, 12, 768, 12, 3072), (12, 512, 8, 2048), 512, 224, 77, 49_408),
    "l14": ((14, 24, 1024, 16, 4096), (12, 768, 12, 3072), 768, 224, 77, 49_408),
    "siglip_b16": ((16, 12, 768, 12, 3072), (12, 768, 12, 3072), 768, 224, 64, 32_000),
}


def get_config(arg=None):
    size = arg or "shapes"
    if size not in SIZES:
        raise ValueError(f"configs/clip.py:{size} is not a size; there are: {', '.join(SIZES)}")
    config = default(model="clip", objective="contrastive")
    model, objective, optimizer = config.model, config.objective, config.optimizer
    vision, text, *shared = SIZES[size]
    model.vision.update(dict(zip(["patch_size", *NAMES], vision, strict=True)))
    model.text.update(dict(zip(NAMES, text, strict=True)))
    model.update(dict(zip(SHARED, shared, strict=True)))
    config.data.length = model.max_length

    if size in ("shapes", "emoji"):
        model.vision.update({**SMALL, "pooling": "mean"})
        model.text.update({**SMALL, "is_causal": False})
        objective.begins_with_bos = False
        config.data.train = ("synthetic:shapes:65536:0:seen",)
        config.data.validation = ("synthetic:shapes:1024:1:held_out",)
        config.data.batch_size = 128
        optimizer.learning_rate = 2e-3
        optimizer.weight_decay = 0.1
        optimizer.b2 = 0.98
        optimizer.schedule.kind = "cosine"
        optimizer.schedule.warmup_steps = 100
        config.train.num_steps = 3000
        config.train.eval_every = 250
        if size == "emoji":
            config.data.train = ("data/google/train",)
            config.data.validation = ("data/google/validation",)
            config.data.too_long = "cut"  # one caption in a hundred
            objective.crop = 0.5
            model.dropout = 0.1
            config.train.num_steps = 1000
        return config

    config.data.tokenizer = "data/pairs/tokenizer.json"
    config.data.train = ("data/pairs/train",)
    config.data.validation = ("data/pairs/validation",)
    config.data.too_long = "cut"
    config.data.batch_size = 32_768
    config.train.num_steps = 32 * 400_000_000 // 32_768
    config.train.eval_every = 5_000
    model.dtype = "bfloat16"
    model.remat = "full"
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.warmup_steps = 2_000

    if size == "siglip_b16":
        model.vision.update({**SIGLIP, "pooling": "attention"})
        model.text.update({**SIGLIP, "is_causal": False, "pad_id": 1})
        model.update({"project_images": False, "text_projection_bias": True})
        model.update({"has_logit_bias": True, "init_logit_scale": 10.0})
        model.max_logit_scale = None
        objective.loss = "sigmoid"
        objective.begins_with_bos = False
        optimizer.learning_rate = 1e-3
        optimizer.weight_decay = 1e-4
        optimizer.b2 = 0.95
        return config

    model.vision.update({**CLIP, "pre_norm": True, "patch_bias": False})
    model.text.update(CLIP)
    model.image_mean = (0.48145466, 0.4578275, 0.40821073)
    model.image_std = (0.26862954, 0.26130258, 0.27577711)
    objective.crop = 0.9  # their only augmentation is a random square
    objective.templates = ("a photo of a {}.",)
    optimizer.learning_rate = 5e-4 if size == "b32" else 4e-4
    optimizer.weight_decay = 0.2
    optimizer.b2 = 0.98
    optimizer.eps = 1e-6
    return config
