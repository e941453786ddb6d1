"""Qwen 3, the dense models (arXiv:2505.09388).

    configs/qwen3.py:0.6b    also 1.7b, 4b, 8b, 14b, 32b

Shapes: table 1 and the released config.json files; 596,049,920, 1,720,574,976, 4,022,468,096,
8,190,735,360, 14,768,307,200 and 32,762,123,264 parameters. Heads are 128 wide whatever embed_dim
/ num_heads is, with an RMS norm on queries and keys.

Of the training, section 3.2 tells only the stages: over 30T tokens in rows of 4,096 (this
config), 5T better ones, and then rows of 32,768, for which the base of the rotary wavelengths was
raised from 10,000 to the 1,000,000 that the release has and this config takes from the start.
Batch, learning rate and schedule are not published: 4M tokens, 3e-4 (1.5e-4 from 14b on) and a
cosine follow Llama 3. Not run here.

With the release's `tokenizer.json` and a token store at the paths below:

    python scripts/train.py --config=configs/qwen3.py:0.6b --workdir=runs/qwen3-0.6b
"""

from lm.config.conversion import default

# num_layers, embed_dim, num_heads, mlp_dim, tie_embeddings, learning_rate
SIZES = {
    "0.6b": (28, 1024, 16, 3072, True, 3e-4),
    "1.7b": (28, 2048, 16, 6144, True, 3e-4),
    "4b": (36, 2560, 32, 9728, True, 3e-4),
    "8b": (36, 4096, 32, 12288, False, 3e-4),
    "14b": (40, 5120, 40, 17408, False, 1.5e-4),
    "32b": (64, 5120, 64, 25600, False, 1.5e-4),
}


def get_config(arg=None):
    size = arg or "0.6b"
    if size not in SIZES:
        raise ValueError(f"configs/qwen3.py:{size} is not a size; there are: {', '.join(SIZES)}")
    num_layers, embed_dim, num_heads, mlp_dim, tied, learning_rate = SIZES[size]
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = 151936
    model.max_length = 32768
    model.num_layers = num_layers
    model.embed_dim = embed_dim
    model.num_heads = num_heads
    model.num_kv_heads = 8
    model.head_dim = 128
    model.mlp_dim = mlp_dim
    model.activation = "swiglu"
    model.norm = "rms"
    model.norm_eps = 1e-6
    model.positions = "rotary"
    model.rotary.theta = 1_000_000.0
    model.qk_norm = True
    model.tie_embeddings = tied
    model.init_std = 0.02
    model.dtype = "bfloat16"
    model.remat = "full" if size in ("14b", "32b") else "projections"

    data = config.data
    data.tokenizer = "data/qwen3/tokenizer.json"
    data.train = ("data/web/train",)
    data.validation = ("data/web/validation",)
    data.length = 4096
    data.batch_size = 1024

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = learning_rate
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.warmup_steps = 2000
    optimizer.schedule.final_fraction = 0.1

    train = config.train
    train.num_tokens = 30_000_000_000_000
    train.eval_every = 1000
    train.eval_batches = 50
    config.checkpoint.every = 1000

    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
