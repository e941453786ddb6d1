"""The Transformer of 2017 (Vaswani et al., arXiv:1706.03762), translating English to German.

    configs/transformer.py:base    also big

Shapes: table 3 of the paper; 63,045,632 and 214,171,648 parameters with 37,000 pieces, of which the
paper says 65 and 213 million. Post-norm, sinusoidal positions, one table for source, target and
softmax, times the root of its width where it is looked up.

Recipe: section 5: Adam with b2 = 0.98 and eps = 1e-9, rates of D ** -0.5 * min(step ** -0.5, step *
4000 ** -1.5), dropout 0.1 (big: 0.3), label smoothing 0.1, about 25,000 tokens of source and of
target a batch, 100,000 steps (big: 300,000). On WMT 2014: 27.3 and 28.4 BLEU with beams of 4 and
checkpoints averaged; 12 hours and 3.5 days on 8 P100. Two things differ: weights start normal,
those that write to the residual stream smaller with depth, and pairs are packed into rows. Not run
here.

With a SentencePiece model of both languages and a token store of the fields `source` and `target`
at the paths below:

    python scripts/train.py --config=configs/transformer.py:base --workdir=runs/transformer-base
"""

from lm.config.conversion import default

# embed_dim, num_heads, mlp_dim, dropout, num_steps
SIZES = {
    "base": (512, 8, 2048, 0.1, 100_000),
    "big": (1024, 16, 4096, 0.3, 300_000),
}
WARMUP = 4000


def get_config(arg=None):
    size = arg or "base"
    if size not in SIZES:
        raise ValueError(
            f"configs/transformer.py:{size} is not a size; there are: {', '.join(SIZES)}"
        )
    embed_dim, num_heads, mlp_dim, dropout, num_steps = SIZES[size]
    config = default(model="encoder_decoder", objective="seq2seq")

    model = config.model
    model.vocab_size = 37_000
    model.max_length = 256
    model.num_layers = 6
    model.embed_dim = embed_dim
    model.num_heads = num_heads
    model.mlp_dim = mlp_dim
    model.activation = "relu"
    model.norm = "layer"
    model.norm_placement = "post"
    model.norm_eps = 1e-6
    model.norm_bias = True
    model.mlp_bias = True
    model.positions = "sinusoidal"
    model.embed_scale = embed_dim**0.5
    model.embed_init_std = embed_dim**-0.5
    model.init_std = None
    model.dropout = dropout
    model.dtype = "bfloat16"

    data = config.data
    data.tokenizer = "data/wmt14/tokenizer.model"
    data.train = ("data/wmt14/train",)
    data.validation = ("data/wmt14/validation",)
    data.encoder_length = 256
    data.length = 256
    data.batch_size = 96

    config.loss.label_smoothing = 0.1

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = (embed_dim * WARMUP) ** -0.5
    optimizer.b1 = 0.9
    optimizer.b2 = 0.98
    optimizer.eps = 1e-9
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 0.0
    optimizer.schedule.kind = "inverse_sqrt"
    optimizer.schedule.warmup_steps = WARMUP

    train = config.train
    train.num_steps = num_steps
    train.eval_every = 1000
    train.eval_batches = 50
    config.checkpoint.every = 1000
    return config
