"""Llama 3 (arXiv:2407.21783) and the small models of Llama 3.2.

    configs/llama3.py:8b      also 70b, 405b: as pretrained, rows of 8,192 tokens
    configs/llama3.py:3.1-8b  also 3.1-70b, 3.1-405b: as released, stretched 8 times to 131,072
    configs/llama3.py:3.2-1b  also 3.2-3b: as released, stretched 32 times, with tied embeddings

Shapes and learning rates: table 3; 8,030,261,248, 70,553,706,496 and 405,853,388,800 parameters,
and 1,235,814,400 and 3,212,749,824, as in the published checkpoints. Recipe: section 3.4.1, of
which the paper gives figures only for 405b: 8,000 steps of warm-up, then a cosine to 1/100 over
1,200,000 steps. Its batch grows from 4M tokens in rows of 4,096 to 8M and 16M in rows of 8,192;
here it is 4M up to 8b and 8M above, in rows of 8,192 throughout. It took 3.8e25 FLOPs on up to
16,384 H100. Llama 3.2 was pruned and distilled from larger models; here it is trained from
nothing with the learning rate of 8b. Initialisation is not published. Not run here.

With the tokenizer of the release and a token store at the paths below:

    python scripts/train.py --config=configs/llama3.py:8b --workdir=runs/llama3-8b
"""

from lm.config.conversion import default

# num_layers, embed_dim, num_heads, head_dim, mlp_dim, tie_embeddings
SHAPES = {
    "1b": (16, 2048, 32, 64, 8192, True),
    "3b": (28, 3072, 24, 128, 8192, True),
    "8b": (32, 4096, 32, 128, 14336, False),
    "70b": (80, 8192, 64, 128, 28672, False),
    "405b": (126, 16384, 128, 128, 53248, False),
}
# rows of 8,192 tokens in a batch, learning_rate
TRAINING = {
    "1b": (512, 3e-4),
    "3b": (512, 3e-4),
    "8b": (512, 3e-4),
    "70b": (1024, 1.5e-4),
    "405b": (1024, 8e-5),
}
# shape, how many times positions are stretched
SIZES = {
    "8b": ("8b", 1),
    "70b": ("70b", 1),
    "405b": ("405b", 1),
    "3.1-8b": ("8b", 8),
    "3.1-70b": ("70b", 8),
    "3.1-405b": ("405b", 8),
    "3.2-1b": ("1b", 32),
    "3.2-3b": ("3b", 32),
}


def get_config(arg=None):
    size = arg or "8b"
    if size not in SIZES:
        raise ValueError(f"configs/llama3.py:{size} is not a size; there are: {', '.join(SIZES)}")
    shape, stretch = SIZES[size]
    num_layers, embed_dim, num_heads, head_dim, mlp_dim, tied = SHAPES[shape]
    batch_size, learning_rate = TRAINING[shape]
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = 128256
    model.max_length = 8192 if stretch == 1 else 131072
    model.num_layers = num_layers
    model.embed_dim = embed_dim
    model.num_heads = num_heads
    model.num_kv_heads = 8
    model.head_dim = head_dim
    model.mlp_dim = mlp_dim
    model.activation = "swiglu"
    model.norm = "rms"
    model.norm_eps = 1e-5
    model.positions = "rotary"
    model.rotary.theta = 500_000.0
    model.rotary.scaling = "none" if stretch == 1 else "llama3"
    model.rotary.factor = float(stretch)
    model.rotary.original_length = 8192
    model.rotary.low_frequency_factor = 1.0
    model.rotary.high_frequency_factor = 4.0
    model.tie_embeddings = tied
    model.init_std = 0.02
    model.dtype = "bfloat16"
    model.remat = "projections" if shape in ("1b", "3b", "8b") else "full"

    data = config.data
    data.tokenizer = "data/llama3/tokenizer.json"
    data.train = ("data/web/train",)
    data.validation = ("data/web/validation",)
    data.length = 8192
    data.batch_size = batch_size

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = learning_rate
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.warmup_steps = 8000
    optimizer.schedule.final_fraction = 0.01

    train = config.train
    train.num_steps = 1_200_000
    train.eval_every = 1000
    train.eval_batches = 50
    config.checkpoint.every = 1000

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 8 if shape == "405b" else 1
    return config
