"""T5 (Raffel et al., arXiv:1910.10683) and T5 1.1, pretrained by span corruption.

    configs/t5.py:small    also base, large, 3b, 11b, v1.1-small, v1.1-base, v1.1-large, v1.1-xl
                           and v1.1-xxl

Shapes: section 3.7 of the paper, and those of the published 1.1 checkpoints, from which flan-T5
comes too: RMS norms before each sublayer, no biases, a relative bias for each stack that its layers
share, scores without a scale. The first version has a ReLU and a head tied to the embedding, which
reads states divided by the root of their width; 1.1 has a gated GELU and a head of its own.
60,506,624 to 11,307,321,344 and 76,961,152 to 11,135,332,352 parameters, as in the checkpoints.

Recipe: section 3.1: 128 rows of 512 tokens, 524,288 steps of C4, 15% of the tokens hidden in spans
of 3 on average, Adafactor at 0.01 / sqrt(max(step, 10,000) / 10,000), dropout 0.1. 1.1 has none in
pretraining (https://github.com/google-research/text-to-text-transfer-transformer,
released_checkpoints.md). z-loss 1e-4 is that of the published code. Three things differ: the rate
warms up over the 10,000 steps that it is constant there, rows are packed from documents that don't
see each other, and dropout is of embeddings, residual branches and attention weights, not also of
the MLP's inside and the last states. Not run here.

With a SentencePiece model of 32,000 pieces (100 more ids are sentinels) and a token store at the
paths below:

    python scripts/train.py --config=configs/t5.py:small --workdir=runs/t5-small
"""

from lm.config.conversion import default

# num_layers of both stacks, embed_dim, num_heads, head_dim, mlp_dim
SIZES = {
    "small": (6, 512, 8, 64, 2048),
    "base": (12, 768, 12, 64, 3072),
    "large": (24, 1024, 16, 64, 4096),
    "3b": (24, 1024, 32, 128, 16384),
    "11b": (24, 1024, 128, 128, 65536),
    "v1.1-small": (8, 512, 6, 64, 1024),
    "v1.1-base": (12, 768, 12, 64, 2048),
    "v1.1-large": (24, 1024, 16, 64, 2816),
    "v1.1-xl": (24, 2048, 32, 64, 5120),
    "v1.1-xxl": (24, 4096, 64, 64, 10240),
}


def get_config(arg=None):
    size = arg or "small"
    if size not in SIZES:
        raise ValueError(f"configs/t5.py:{size} is not a size; there are: {', '.join(SIZES)}")
    num_layers, embed_dim, num_heads, head_dim, mlp_dim = SIZES[size]
    first = not size.startswith("v1.1-")
    config = default(model="encoder_decoder", objective="span_corruption")

    model = config.model
    model.vocab_size = 32128
    model.max_length = 512
    model.num_layers = num_layers
    model.embed_dim = embed_dim
    model.num_heads = num_heads
    model.head_dim = head_dim
    model.mlp_dim = mlp_dim
    model.activation = "relu" if first else "geglu_tanh"
    model.norm = "rms"
    model.norm_eps = 1e-6
    model.positions = "relative"
    model.relative_buckets = 32
    model.relative_max_distance = 128
    model.query_scale = 1.0
    model.tie_embeddings = first
    model.logit_scale = embed_dim**-0.5 if first else 1.0
    model.dropout = 0.1 if first else 0.0
    model.attention_dropout = model.dropout
    model.init_std = None
    model.embed_init_std = 1.0
    model.dtype = "bfloat16"
    model.remat = "none" if size.endswith(("small", "base")) else "projections"

    objective = config.objective
    objective.noise_density = 0.15
    objective.mean_span = 3.0

    data = config.data
    data.tokenizer = "data/t5/tokenizer.model"
    data.train = ("data/c4/train",)
    data.validation = ("data/c4/validation",)
    data.encoder_length = 512
    data.length = 114  # what 568 tokens of text leave to predict
    data.batch_size = 128

    config.loss.z_loss = 1e-4

    optimizer = config.optimizer
    optimizer.name = "adafactor"
    optimizer.learning_rate = 0.01
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 0.0
    optimizer.schedule.kind = "inverse_sqrt"
    optimizer.schedule.warmup_steps = 10_000

    train = config.train
    train.num_steps = 524_288
    train.eval_every = 5000
    train.eval_batches = 100
    config.checkpoint.every = 5000

    config.mesh.data = 1  # parameters and optimizer spread over all devices
    config.mesh.fsdp = -1
    return config
