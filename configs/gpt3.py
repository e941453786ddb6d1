"""GPT-3 (Brown et al. 2020, arXiv:2005.14165).

    configs/gpt3.py:125m    also 350m, 760m, 1.3b, 2.7b, 6.7b, 13b, 175b

Shapes, batches and learning rates: table 2.1; the rest of the recipe: appendix B. Two of the
table's entries contradict the numbers of parameters in table D.1 and are read so that these come
out: 1.3b has 16 heads of 128 (the table: 24), 13b has width 5120 (the table: 5140).

Layers alternate "dense and locally banded sparse attention patterns" like the Sparse Transformer,
with no numbers given. Here every second layer sees a window of 256 tokens, which is our
approximation. For dense attention everywhere: --config.model.window=2048, which sees it all.

Three more differences: the paper ramps the batch up from 32k tokens; its learning rate reaches
its last tenth at 260B tokens and stays, here it gets there at the end, 300B; 175b has 3.15M
tokens a batch instead of 3.2M, a number of rows that 512 divides. Not run here; the paper's 175b
took 3.14e23 FLOPs.

With the `tokenizer.json` of Hugging Face's gpt2 and a token store at the paths below:

    python scripts/train.py --config=configs/gpt3.py:125m --workdir=runs/gpt3-125m
"""

from lm.config.conversion import default

# num_layers, embed_dim, num_heads, rows of 2048 tokens in a batch, learning_rate
SIZES = {
    "125m": (12, 768, 12, 256, 6e-4),
    "350m": (24, 1024, 16, 256, 3e-4),
    "760m": (24, 1536, 16, 256, 2.5e-4),
    "1.3b": (24, 2048, 16, 512, 2e-4),
    "2.7b": (32, 2560, 32, 512, 1.6e-4),
    "6.7b": (32, 4096, 32, 1024, 1.2e-4),
    "13b": (40, 5120, 40, 1024, 1e-4),
    "175b": (96, 12288, 96, 1536, 0.6e-4),
}


def get_config(arg=None):
    size = arg or "125m"
    if size not in SIZES:
        raise ValueError(f"configs/gpt3.py:{size} is not a size; there are: {', '.join(SIZES)}")
    num_layers, embed_dim, num_heads, batch_size, learning_rate = SIZES[size]
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = 50257
    model.max_length = 2048
    model.num_layers = num_layers
    model.embed_dim = embed_dim
    model.num_heads = num_heads
    model.activation = "gelu_tanh"
    model.norm = "layer"
    model.norm_eps = 1e-5
    model.norm_bias = True
    model.positions = "learned"
    model.layer_pattern = ("global", "local")
    model.window = 256
    model.qkv_bias = True
    model.out_bias = True
    model.mlp_bias = True
    model.tie_embeddings = True
    model.init_std = 0.02
    model.dtype = "bfloat16"
    model.remat = "projections"

    data = config.data
    data.tokenizer = "data/gpt2/tokenizer.json"
    data.train = ("data/web/train",)
    data.validation = ("data/web/validation",)
    data.length = 2048
    data.batch_size = batch_size

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = learning_rate
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.warmup_steps = 375_000_000 // (batch_size * 2048)
    optimizer.schedule.final_fraction = 0.1

    train = config.train
    train.num_tokens = 300_000_000_000
    train.eval_every = 1000
    train.eval_batches = 50
    config.checkpoint.every = 1000

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 8 if size == "175b" else 1
    return config
