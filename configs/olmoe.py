"""OLMoE 1B-7B (arXiv:2409.02060).

    configs/olmoe.py:1b-7b

Shape: the released config.json; each layer's router sends a token to 8 of 64 experts, with
probabilities over all 64 as weights, which aren't divided by their sum. The release's RMS norms of
queries and keys span all heads; ours are one head wide, so that this model has 6,919,100,416
parameters where the release has 61,440 more. A token meets 1.3B of them.

Recipe of the paper: 5.1T tokens in batches of 4M, load-balance loss 0.01, router z-loss 0.001,
4e-4 with a warm-up of 10B tokens and a cosine to a tenth. Left out: its last 100B tokens, over
which the learning rate falls to zero, and its truncated initial weights. Not run here.

With the release's `tokenizer.json` and a token store at the paths below:

    python scripts/train.py --config=configs/olmoe.py:1b-7b --workdir=runs/olmoe-1b-7b
"""

from lm.config.conversion import default

SIZES = ("1b-7b",)


def get_config(arg=None):
    size = arg or "1b-7b"
    if size not in SIZES:
        raise ValueError(f"configs/olmoe.py:{size} is not a size; there are: {', '.join(SIZES)}")
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = 50304
    model.max_length = 4096
    model.num_layers = 16
    model.embed_dim = 2048
    model.num_heads = 16
    model.num_kv_heads = 16
    model.head_dim = 128
    model.moe.num_experts = 64
    model.moe.num_experts_per_token = 8
    model.moe.mlp_dim = 1024
    model.moe.router = "softmax_topk"
    model.moe.normalize = False
    model.moe.balance_loss = 0.01
    model.moe.z_loss = 0.001
    model.activation = "swiglu"
    model.norm = "rms"
    model.norm_eps = 1e-5
    model.positions = "rotary"
    model.rotary.theta = 10_000.0
    model.qk_norm = True
    model.tie_embeddings = False
    model.init_std = 0.02
    model.dtype = "bfloat16"
    model.remat = "full"

    data = config.data
    data.tokenizer = "data/olmoe/tokenizer.json"
    data.train = ("data/web/train",)
    data.validation = ("data/web/validation",)
    data.length = 4096
    data.batch_size = 1024

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = 4e-4
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.warmup_steps = 2400
    optimizer.schedule.final_fraction = 0.1

    train = config.train
    train.num_tokens = 5_100_000_000_000
    train.eval_every = 1000
    train.eval_batches = 50
    config.checkpoint.every = 1000

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 8
    return config
