"""A ladder: one family of decoders by one dial, for scaling laws (arXiv:2203.15556).

    configs/ladder.py:4               4 layers, 20 tokens for each parameter
    configs/ladder.py:4:40            40 tokens for each parameter
    configs/ladder.py:isoflop:1e13:4  as many tokens as 1e13 FLOPs of training are
    configs/ladder.py:12x64           12 layers of width 768: 64 for each layer, not 24

All follows from the depth and the tokens:

- width 24 for each layer, in heads of 24: 12 * 24**2 * depth**3 parameters beside the embeddings,
  55 thousand at depth 2 and 1.5 million at depth 6. Parameters are counted without embeddings;
- a batch of about 0.8 * sqrt(tokens) tokens, a power of two of rows: the critical batch grows with
  the tokens, not with the model (arXiv:2410.21676);
- rows of 64 bytes: in longer ones the largest models begin to copy names midway, which no law of
  the smaller ones foresees (docs/ladder.md);
- a learning rate of 1e-2 and initial weights as at 2 layers of width 48, and at all other sizes
  what the maximal-update parametrization makes of them (lm/optim/parametrization.py);
- warm-up, a stable learning rate, and a decay to nothing over the last fifth (arXiv:2404.06395). So
  runs of the same batch and different lengths share all steps before their decay, and
  `scripts/ladder.py` trains one long run and several cool-downs from its checkpoints.

The text is Python's standard library as bytes. docs/ladder.md says how the table
is made.

    python scripts/prepare_data.py --data=stdlib --tokenizer=bytes --out=data/stdlib-bytes \\
        --validation-fraction=0.02
    python scripts/train.py --config=configs/ladder.py:isoflop:1e12:2 --workdir=runs/ladder-2
"""

import math

from lm.config.conversion import default, resolve
from lm.models import flops

WIDTH_PER_LAYER = 24
TOKENS_PER_PARAMETER = 20.0
LENGTH = 64
BATCH = 0.8  # tokens of a batch, in roots of the run's tokens
BASE_DEPTH, LEARNING_RATE = 2, 1e-2


def get_config(arg=None):
    depth, ratio, tokens_per_parameter, budget = _parse(arg or "4")
    config = default(model="decoder", objective="causal")

    model = config.model
    model.vocab_size = 264
    model.max_length = LENGTH
    model.num_layers = depth
    model.embed_dim = depth * ratio
    model.num_heads = depth
    model.activation = "relu2"
    model.qk_norm = True
    model.tie_embeddings = False
    model.init_std = None  # fan_in ** -0.5 at the base
    model.parametrization = "mup"
    model.base_num_layers = BASE_DEPTH
    model.base_embed_dim = BASE_DEPTH * WIDTH_PER_LAYER
    model.base_head_dim = WIDTH_PER_LAYER
    model.scan_unroll = -1 if depth <= 8 else 1  # a loop costs a CPU a tenth of the speed

    shape = resolve(config).model
    tokens = tokens_per_parameter * flops.parameters(shape).non_embedding
    if budget is not None:
        tokens = budget / flops.flops_per_token(shape, LENGTH)
    rows = 2 ** max(0, round(math.log2(BATCH * math.sqrt(tokens) / LENGTH)))

    data = config.data
    data.tokenizer = "bytes"
    data.train = ("data/stdlib-bytes/train",)
    data.validation = ("data/stdlib-bytes/validation",)
    data.length = LENGTH
    data.batch_size = rows
    config.loader.kind = "thread"

    train = config.train
    train.num_steps = max(20, round(tokens / (rows * LENGTH)))
    train.log_every = max(1, train.num_steps // 100)

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = LEARNING_RATE
    optimizer.b2 = 0.99
    optimizer.weight_decay = 0.0
    optimizer.schedule.kind = "wsd"
    optimizer.schedule.warmup_steps = max(10, train.num_steps // 50)
    optimizer.schedule.final_fraction = 0.0
    return config


def _parse(arg):
    """(depth, width for each layer, tokens for each parameter, FLOPs or None) of the argument."""
    budget, tokens = None, TOKENS_PER_PARAMETER
    parts = arg.split(":")
    try:
        if parts[0] == "isoflop":
            _, flop, size = parts
            budget = float(flop)
        else:
            size, *rest = parts
            [tokens] = map(float, rest or [tokens])
        depth, _, ratio = size.partition("x")
        shape = int(depth), int(ratio or WIDTH_PER_LAYER)
    except ValueError:
        raise ValueError(
            f"configs/ladder.py:{arg} is not DEPTH[xWIDTH], DEPTH[xWIDTH]:TOKENS_PER_PARAMETER or "
            "isoflop:FLOPS:DEPTH[xWIDTH]"
        ) from None
    if min(*shape, tokens, 1.0 if budget is None else budget) <= 0:
        raise ValueError(f"configs/ladder.py:{arg}: all numbers must be positive")
    return *shape, tokens, budget
