"""Llama 2 (arXiv:2307.09288).

    configs/llama2.py:7b    also 13b, 70b

Shapes: table 1 and the published checkpoints, whose 6,738,415,616, 13,015,864,320 and
68,976,648,192 parameters these are; only 70b has fewer heads of keys and values (8). Recipe:
section 2.2: 2T tokens in batches of 4M, rows of 4,096, AdamW with 0.9, 0.95 and 1e-5, 2,000 steps
of warm-up, a cosine to a tenth, weight decay 0.1, gradients clipped to 1. The 7b took 184,320 hours
of A100 80GB, the 70b 1,720,320 (table 2). Initialisation is not published. Not run here.

7b is also the shape with which ahead-of-time compilers are compared: docs/scale.md.

With the release's `tokenizer.model` and a token store at the paths below:

    python scripts/train.py --config=configs/llama2.py:7b --workdir=runs/llama2-7b
"""

from lm.config.conversion import default

# num_layers, embed_dim, num_heads, num_kv_heads, mlp_dim, learning_rate
SIZES = {
    "7b": (32, 4096, 32, 32, 11008, 3e-4),
    "13b": (40, 5120, 40, 40, 13824, 3e-4),
    "70b": (80, 8192, 64, 8, 28672, 1.5e-4),
}


def get_config(arg=None):
    size = arg or "7b"
    if size not in SIZES:
        raise ValueError(f"configs/llama2.py:{size} is not a size; there are: {', '.join(SIZES)}")
    num_layers, embed_dim, num_heads, num_kv_heads, mlp_dim, learning_rate = SIZES[size]
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = 32000
    model.max_length = 4096
    model.num_layers = num_layers
    model.embed_dim = embed_dim
    model.num_heads = num_heads
    model.num_kv_heads = num_kv_heads
    model.head_dim = 128
    model.mlp_dim = mlp_dim
    model.activation = "swiglu"
    model.norm = "rms"
    model.norm_eps = 1e-5
    model.positions = "rotary"
    model.rotary.theta = 10_000.0
    model.tie_embeddings = False
    model.init_std = 0.02
    model.dtype = "bfloat16"
    model.remat = "full" if size == "70b" else "projections"

    data = config.data
    data.tokenizer = "data/llama2/tokenizer.model"
    data.train = ("data/web/train",)
    data.validation = ("data/web/validation",)
    data.length = 4096
    data.batch_size = 1024

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = learning_rate
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-5
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.warmup_steps = 2000
    optimizer.schedule.final_fraction = 0.1

    train = config.train
    train.num_tokens = 2_000_000_000_000
    train.eval_every = 1000
    train.eval_batches = 50
    config.checkpoint.every = 1000

    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
