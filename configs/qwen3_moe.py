"""Qwen 3, the mixtures of experts (arXiv:2505.09388).

    configs/qwen3_moe.py:30b-a3b    also 235b-a22b

Shapes: table 2 and the released config.json files; 30,532,122,624 and 235,093,634,560 parameters,
of which a token meets 3.3B and 22.2B. Every layer has 128 experts and no shared one; its router
sends a token to 8 of them, with their probabilities divided by their sum as weights. The
load-balance loss is that of the global batch (section 2), as it is here; its coefficient is the
release's `router_aux_loss_coef`, 0.001, times 8: at a balanced load that loss is 8, this one 1.

Of the training only the stages are told: see configs/qwen3.py, whose batch and schedule these
are. Not run here.

With the release's `tokenizer.json` and a token store at the paths below:

    python scripts/train.py --config=configs/qwen3_moe.py:30b-a3b --workdir=runs/qwen3-30b-a3b
"""

from lm.config.conversion import default

# num_layers, embed_dim, num_heads, mlp_dim of an expert, learning_rate
SIZES = {
    "30b-a3b": (48, 2048, 32, 768, 3e-4),
    "235b-a22b": (94, 4096, 64, 1536, 1.5e-4),
}


def get_config(arg=None):
    size = arg or "30b-a3b"
    if size not in SIZES:
        raise ValueError(
            f"configs/qwen3_moe.py:{size} is not a size; there are: {', '.join(SIZES)}"
        )
    num_layers, embed_dim, num_heads, mlp_dim, learning_rate = SIZES[size]
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = 151936
    model.max_length = 32768
    model.num_layers = num_layers
    model.embed_dim = embed_dim
    model.num_heads = num_heads
    model.num_kv_heads = 4
    model.head_dim = 128
    model.moe.num_experts = 128
    model.moe.num_experts_per_token = 8
    model.moe.mlp_dim = mlp_dim
    model.moe.router = "softmax_topk"
    model.moe.normalize = True
    model.moe.balance_loss = 0.008
    model.activation = "swiglu"
    model.norm = "rms"
    model.norm_eps = 1e-6
    model.positions = "rotary"
    model.rotary.theta = 1_000_000.0
    model.qk_norm = True
    model.tie_embeddings = False
    model.init_std = 0.02
    model.dtype = "bfloat16"
    model.remat = "full"

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
    config.mesh.expert = 8
    return config
