"""The base of a learning-rate sweep over widths: two layers of width 64 on Tiny Shakespeare.

    configs/transfer.py           the optimizer is AdamW
    configs/transfer.py:muon      matrices by Muon

Rows of 64 bytes, 4 a batch, 60 steps: each model sees 15,360 bytes once. docs/transfer.md has what
came out, and how long it took; wider models are made of this one by scripts/lr_transfer.py.

    python scripts/prepare_data.py --data=input.txt --tokenizer=bytes --out=data/shakespeare \\
        --split=tail --validation-fraction=0.1
    python scripts/lr_transfer.py --config=configs/transfer.py --widths=64,128,256,512
"""

from lm.config.conversion import default


def get_config(arg=None):
    if arg not in (None, "", "adamw", "muon"):
        raise ValueError(f"configs/transfer.py takes adamw or muon, got {arg!r}")
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = 264
    model.max_length = 64
    model.num_layers = 2
    model.embed_dim = 64
    model.num_heads = 4
    model.tie_embeddings = False
    model.init_std = None  # fan_in ** -0.5, whatever the width
    model.parametrization = "mup"
    model.base_embed_dim = 64
    model.base_num_layers = 2
    model.base_head_dim = 16
    model.scan_unroll = -1

    data = config.data
    data.tokenizer = "bytes"
    data.train = ("data/shakespeare/train",)
    data.validation = ("data/shakespeare/validation",)
    data.length = 64
    data.batch_size = 4
    config.loader.kind = "thread"
    config.loss.chunk_size = 0

    optimizer = config.optimizer
    optimizer.name = arg or "adamw"
    optimizer.learning_rate = 2**-6
    optimizer.b2 = 0.95
    optimizer.weight_decay = 0.0
    optimizer.schedule.kind = "linear"
    optimizer.schedule.warmup_steps = 10
    optimizer.schedule.final_fraction = 0.1

    config.train.num_steps = 60
    return config
