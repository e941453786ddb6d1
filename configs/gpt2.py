"""GPT-2 (Radford et al. 2019), trained as nanoGPT reproduces it.

    configs/gpt2.py:124m    also 350m, 774m, 1.5b

Shapes: table 2 of "Language Models are Unsupervised Multitask Learners"; 124,439,808,
354,823,168, 774,030,080 and 1,557,611,200 parameters, as in the published checkpoints (the
paper's own totals are a little off). Two things differ: positions start with deviation 0.02 here
and 0.01 there, and there is no dropout, which doesn't pay where no token is seen twice.

The paper gives no recipe. This one is nanoGPT's for 124m (https://github.com/karpathy/nanoGPT):
491,520 tokens a batch, 600,000 steps of OpenWebText, which took four days on 8 A100 40GB and
ended at a loss of about 2.85 nats; peak learning rates of the larger sizes are those of GPT-3
(arXiv:2005.14165, table 2.1). Not run here.

With the `tokenizer.json` of Hugging Face's gpt2 and a token store at the paths below:

    python scripts/train.py --config=configs/gpt2.py:124m --workdir=runs/gpt2-124m
"""

from lm.config.conversion import default

# num_layers, embed_dim, num_heads, learning_rate
SIZES = {
    "124m": (12, 768, 12, 6e-4),
    "350m": (24, 1024, 16, 3e-4),
    "774m": (36, 1280, 20, 2.5e-4),
    "1.5b": (48, 1600, 25, 2e-4),
}


def get_config(arg=None):
    size = arg or "124m"
    if size not in SIZES:
        raise ValueError(f"configs/gpt2.py:{size} is not a size; there are: {', '.join(SIZES)}")
    num_layers, embed_dim, num_heads, learning_rate = SIZES[size]
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = 50257
    model.max_length = 1024
    model.num_layers = num_layers
    model.embed_dim = embed_dim
    model.num_heads = num_heads
    model.activation = "gelu_tanh"
    model.norm = "layer"
    model.norm_eps = 1e-5
    model.norm_bias = True
    model.positions = "learned"
    model.qkv_bias = True
    model.out_bias = True
    model.mlp_bias = True
    model.tie_embeddings = True
    model.init_std = 0.02
    model.dtype = "bfloat16"
    model.remat = "none" if size == "124m" else "projections"

    data = config.data
    data.tokenizer = "data/gpt2/tokenizer.json"
    data.train = ("data/openwebtext/train",)
    data.validation = ("data/openwebtext/validation",)
    data.length = 1024
    data.batch_size = 480

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = learning_rate
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.weight_decay = 0.1
    optimizer.decay_roles = ("matrix", "embedding")
    optimizer.clip_norm = 1.0
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.warmup_steps = 2000
    optimizer.schedule.final_fraction = 0.1

    train = config.train
    train.num_steps = 600_000
    train.eval_every = 1000
    train.eval_batches = 200
    config.checkpoint.every = 2000

    config.mesh.data = 1  # parameters and optimizer spread over all devices
    config.mesh.fsdp = -1
    return config
