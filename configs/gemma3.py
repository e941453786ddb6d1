"""Gemma 3, the text models (arXiv:2503.19786).

    configs/gemma3.py:270m    also 1b, 4b, 12b, 27b

Shapes: the published code (github.com/google-deepmind/gemma, gm/nn/_gemma.py) and config.json
files; 268,098,176, 999,885,952, 3,880,099,328, 11,765,788,416 and 27,009,002,240 parameters with
the tokenizer's 262,144 pieces, as the text-only checkpoints of KerasHub count them. Hugging
Face's files from 4b on have 64 more rows in the table, for images.

Five layers with a window (512 tokens up to 1b, 1,024 above) for each that sees everything;
wavelengths are to base 10,000 in the former and 1,000,000 in the latter, where positions are
stretched 8 times from 4b on. 27b scales its scores by (embed_dim / num_heads) ** -0.5, not by its
head_dim of 128.

The report (section 2.2 and table 2) gives the tokens below (270m: its model card), rows of 32,768
with the stretch at the end of training, and the chips (512 TPU v5e for 1b, 6,144 v5p for 27b).
Learning rate and batch are not published, and the models were distilled from a larger one; plain
training with 3e-4 (1.5e-4 from 12b on), 4M tokens and a cosine is chosen here. Not run here.

With the release's `tokenizer.model` and a token store at the paths below:

    python scripts/train.py --config=configs/gemma3.py:1b --workdir=runs/gemma3-1b
"""

from lm.config.conversion import default

# num_layers, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim
SHAPES = {
    "270m": (18, 640, 4, 1, 256, 2048),
    "1b": (26, 1152, 4, 1, 256, 6912),
    "4b": (34, 2560, 8, 4, 256, 10240),
    "12b": (48, 3840, 16, 8, 256, 15360),
    "27b": (62, 5376, 32, 16, 128, 21504),
}
# window, how many times positions are stretched, max_length
CONTEXTS = {
    "270m": (512, 1, 32768),
    "1b": (512, 1, 32768),
    "4b": (1024, 8, 131072),
    "12b": (1024, 8, 131072),
    "27b": (1024, 8, 131072),
}
# trillions of tokens, learning_rate
TRAINING = {
    "270m": (6, 3e-4),
    "1b": (2, 3e-4),
    "4b": (4, 3e-4),
    "12b": (12, 1.5e-4),
    "27b": (14, 1.5e-4),
}


def get_config(arg=None):
    size = arg or "1b"
    if size not in SHAPES:
        raise ValueError(f"configs/gemma3.py:{size} is not a size; there are: {', '.join(SHAPES)}")
    num_layers, embed_dim, num_heads, num_kv_heads, head_dim, mlp_dim = SHAPES[size]
    window, stretch, max_length = CONTEXTS[size]
    trillions, learning_rate = TRAINING[size]
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = 262144
    model.max_length = max_length
    model.num_layers = num_layers
    model.embed_dim = embed_dim
    model.num_heads = num_heads
    model.num_kv_heads = num_kv_heads
    model.head_dim = head_dim
    model.mlp_dim = mlp_dim
    model.activation = "geglu_tanh"
    model.norm = "rms_plus_one"
    model.norm_placement = "both"
    model.norm_eps = 1e-6
    model.positions = "rotary"
    model.rotary.theta = 1_000_000.0
    model.rotary.local_theta = 10_000.0
    model.rotary.scaling = "none" if stretch == 1 else "linear"
    model.rotary.factor = float(stretch)
    model.layer_pattern = ("local", "local", "local", "local", "local", "global")
    model.window = window
    model.qk_norm = True
    model.query_scale = (embed_dim / num_heads if size == "27b" else head_dim) ** -0.5
    model.tie_embeddings = True
    model.embed_scale = embed_dim**0.5
    model.init_std = 0.02
    model.dtype = "bfloat16"
    model.remat = "full" if size in ("12b", "27b") else "projections"

    data = config.data
    data.tokenizer = "data/gemma3/tokenizer.model"
    data.train = ("data/web/train",)
    data.validation = ("data/web/validation",)
    data.length = 32768
    data.batch_size = 128

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
    train.num_tokens = trillions * 1_000_000_000_000
    train.eval_every = 1000
    train.eval_batches = 20
    config.checkpoint.every = 1000

    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
