"""Mistral 7B v0.1 (arXiv:2310.06825).

    configs/mistral.py:7b

Shape: table 1; 7,241,732,096 parameters, as in the published checkpoint. Every layer sees a
window of 4,096 tokens (section 2), so 32 layers reach 131,072 back, and the cache of any length
holds 4,096.

How it was trained is not published. This recipe is that of Llama 2 7B (arXiv:2307.09288, section
2.2): 2T tokens in batches of 4M, 3e-4 with a cosine to a tenth. Not run here.

With the release's `tokenizer.model` and a token store at the paths below:

    python scripts/train.py --config=configs/mistral.py:7b --workdir=runs/mistral-7b
"""

from lm.config.conversion import default

SIZES = ("7b",)


def get_config(arg=None):
    size = arg or "7b"
    if size not in SIZES:
        raise ValueError(f"configs/mistral.py:{size} is not a size; there are: {', '.join(SIZES)}")
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = 32000
    model.max_length = 32768
    model.num_layers = 32
    model.embed_dim = 4096
    model.num_heads = 32
    model.num_kv_heads = 8
    model.head_dim = 128
    model.mlp_dim = 14336
    model.activation = "swiglu"
    model.norm = "rms"
    model.norm_eps = 1e-5
    model.positions = "rotary"
    model.rotary.theta = 10_000.0
    model.layer_pattern = ("local",)
    model.window = 4096
    model.tie_embeddings = False
    model.init_std = 0.02
    model.dtype = "bfloat16"
    model.remat = "projections"

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
