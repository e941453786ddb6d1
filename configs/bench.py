"""Shapes for comparing speed with other codebases: a plain GPT-2 in float32 on random tokens.

    configs/bench.py:small8k     vocab 8192, 4 layers, width 256, 4 heads, 16 rows of 256 a batch
    configs/bench.py:gpt2_124m   vocab 50257, 12 layers, width 768, 12 heads, 2 rows of 512 a batch

Layer norms without bias, no biases, exact GELU, learned positions, tied head, no dropout; AdamW
3e-4 (0.9, 0.95, decay 0.1 on everything), gradient clip 1.0. Small enough for two CPU cores. Tokens
are those of the tokenizer `bytes`, below 259. There is nothing to learn.

    python scripts/bench.py --config=configs/bench.py:small8k
"""

from lm.config.conversion import default

# vocab_size, num_layers, embed_dim, num_heads, length, batch_size
SIZES = {
    "small8k": (8192, 4, 256, 4, 256, 16),
    "gpt2_124m": (50257, 12, 768, 12, 512, 2),
}


def get_config(arg=None):
    size = arg or "small8k"
    if size not in SIZES:
        raise ValueError(f"configs/bench.py:{size} is not a size; there are: {', '.join(SIZES)}")
    vocab_size, num_layers, embed_dim, num_heads, length, batch_size = SIZES[size]
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = vocab_size
    model.max_length = length
    model.num_layers = num_layers
    model.embed_dim = embed_dim
    model.num_heads = num_heads
    model.activation = "gelu"
    model.norm = "layer"
    model.norm_eps = 1e-5
    model.positions = "learned"
    model.tie_embeddings = True
    model.init_std = 0.02
    model.dtype = "float32"
    model.scan_unroll = -1  # no loop over layers, as in the other codebases

    data = config.data
    data.train = ("synthetic:random",)
    data.length = length
    data.batch_size = batch_size

    config.loss.chunk_size = 512

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = 3e-4
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.weight_decay = 0.1
    optimizer.decay_roles = ("matrix", "embedding", "vector")
    optimizer.clip_norm = 1.0
    optimizer.schedule.kind = "constant"

    config.train.num_steps = 20
    return config
