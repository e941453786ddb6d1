"""Mixtral 8x7B (arXiv:2401.04088) and 8x22B.

    configs/mixtral.py:8x7b    also 8x22b

Shapes: table 1 and the released config.json files; 46,702,792,704 and 140,620,634,112 parameters,
of which a token meets 12.9B and 39.2B. Each layer's router sends a token to 2 of 8 experts, with
the softmax over those two as weights (section 2.1). No layer has a window. The coefficient of the
load-balance loss is the releases' `router_aux_loss_coef`, 0.02 and 0.001, times 2: at a balanced
load that loss is 2, this one 1.

How it was trained is not published. This recipe is that of configs/mistral.py. Not run here.

With the release's `tokenizer.model` and a token store at the paths below:

    python scripts/train.py --config=configs/mixtral.py:8x7b --workdir=runs/mixtral-8x7b
"""

from lm.config.conversion import default

# num_layers, embed_dim, num_heads, mlp_dim, max_length, balance_loss
SIZES = {
    "8x7b": (32, 4096, 32, 14336, 32768, 0.04),
    "8x22b": (56, 6144, 48, 16384, 65536, 0.002),
}


def get_config(arg=None):
    size = arg or "8x7b"
    if size not in SIZES:
        raise ValueError(f"configs/mixtral.py:{size} is not a size; there are: {', '.join(SIZES)}")
    num_layers, embed_dim, num_heads, mlp_dim, max_length, balance_loss = SIZES[size]
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = 32000
    model.max_length = max_length
    model.num_layers = num_layers
    model.embed_dim = embed_dim
    model.num_heads = num_heads
    model.num_kv_heads = 8
    model.head_dim = 128
    model.moe.num_experts = 8
    model.moe.num_experts_per_token = 2
    model.moe.mlp_dim = mlp_dim
    model.moe.router = "topk_softmax"
    model.moe.balance_loss = balance_loss
    model.activation = "swiglu"
    model.norm = "rms"
    model.norm_eps = 1e-5
    model.positions = "rotary"
    model.rotary.theta = 1_000_000.0
    model.tie_embeddings = False
    model.init_std = 0.02
    model.dtype = "bfloat16"
    model.remat = "full"

    data = config.data
    data.tokenizer = "data/mistral/tokenizer.model"
    data.train = ("data/web/train",)
    data.validation = ("data/web/validation",)
    data.length = 8192
    data.batch_size = 512

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = 3e-4
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
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
    config.mesh.expert = 8
    return config
