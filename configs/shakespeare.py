"""A character model of Tiny Shakespeare: nanoGPT's recipe for a CPU.

    configs/shakespeare.py            also :student and :distilled

Source: https://github.com/karpathy/nanoGPT, config/train_shakespeare_char.py with the README's
options for a CPU ("I only have a macbook"). 4 layers, 4 heads, width 128, rows of 64 characters,
12 a batch, 2,000 steps: 1.5 epochs, a few minutes on two cores. Published: a validation loss of
1.88 nats per character, from a sample of the validation text; here all of it is scored.
Characters are bytes in this text, so the losses compare, though our table has 259 rows (all bytes
and three special tokens) and theirs 65.

The first 90% of input.txt (1,003,854 bytes) are for training, the rest for validation:

    python scripts/prepare_data.py --data=input.txt --tokenizer=bytes --out=data/shakespeare \\
        --split=tail --validation-fraction=0.1
    python scripts/train.py --config=configs/shakespeare.py --workdir=runs/shakespeare

student: 2 layers of width 64, a seventh of the parameters, 1,000 steps. distilled: the same with
runs/shakespeare as its teacher (arXiv:1503.02531); docs/smaller.md has the losses of both.
"""

from lm.config.conversion import default

SIZES = {"student": "causal", "distilled": "lm.compression.distillation"}  # their objective


def get_config(arg=None):
    if arg and arg not in SIZES:
        raise ValueError(f"configs/shakespeare.py:{arg}: there are {', '.join(SIZES)}")
    config = default(model="decoder", objective=SIZES.get(arg, "causal"))
    if arg == "distilled":
        config.objective.teacher = "runs/shakespeare"

    model = config.model
    model.vocab_size = 259
    model.max_length = 64
    model.num_layers = 2 if arg else 4
    model.embed_dim = 64 if arg else 128
    model.num_heads = 4
    model.activation = "gelu"
    model.norm = "layer"
    model.norm_eps = 1e-5
    model.positions = "learned"
    model.tie_embeddings = True
    model.init_std = 0.02
    model.dropout = 0.0

    data = config.data
    data.tokenizer = "bytes"
    data.train = ("data/shakespeare/train",)
    data.validation = ("data/shakespeare/validation",)
    data.length = 64
    data.batch_size = 12
    config.loader.kind = "thread"

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = 1e-3
    optimizer.b1 = 0.9
    optimizer.b2 = 0.99
    optimizer.weight_decay = 0.1
    optimizer.decay_roles = ("matrix", "embedding")
    optimizer.clip_norm = 1.0
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.warmup_steps = 100
    optimizer.schedule.final_fraction = 0.1

    config.train.num_steps = 1000 if arg else 2000
    config.train.eval_every = 250
    return config
