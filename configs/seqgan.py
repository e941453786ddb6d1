"""SeqGAN on its synthetic task (arXiv:1609.05473): sequences of an LSTM with N(0, 1) parameters.

    configs/seqgan.py:small    also tiny, published

small has the published method at a small size. published has the sizes and steps of the paper and
of its authors' code: 5,000 ids, 20 tokens, 120 epochs of maximum likelihood over 10,000
sequences, 150 of the discriminator, and 200 rounds of one policy gradient and 15 epochs of the
discriminator. They report 8.736 nats per token under their oracle (maximum likelihood 9.038,
random 10.310), where L2 regularization and roll-outs by a slower copy of the generator are theirs
alone. Neither was run to its end here.

    python scripts/train.py --config=configs/seqgan.py --workdir=runs/seqgan

The generator by maximum likelihood alone, for as many steps and at other temperatures:

    python scripts/train.py --config=configs/seqgan.py --workdir=runs/mle \\
        --config.objective.pretrain_steps=6000 --config.objective.temperatures='(0.5, 0.7, 0.9)'
"""

from lm.config.conversion import default

# vocab_size, length, widths, filters, discriminator_dim, num_rollouts,
# pretrain_steps, discriminator_steps, d_steps, rounds, discriminator_learning_rate
SIZES = {
    "tiny": (264, 8, (1, 2, 4), (8, 8, 8), 16, 2, 20, 10, 2, 10, 1e-3),
    "small": (264, 12, (1, 2, 3, 4, 5, 8), (32,) * 6, 32, 4, 2000, 500, 3, 875, 1e-3),
    "published": (
        *(5000, 20, (*range(1, 11), 15, 20)),
        (100, 200, 200, 200, 200, 100, 100, 100, 100, 100, 160, 160),
        *(64, 16, 120 * 156, 150 * 156, 15 * 156, 200, 1e-4),
    ),
}


def get_config(arg=None):
    size = arg or "small"
    if size not in SIZES:
        raise ValueError(f"configs/seqgan.py:{size} is not a size; there are: {', '.join(SIZES)}")
    vocab_size, length, widths, filters, width, rollouts, *steps, rate = SIZES[size]
    pretrain_steps, discriminator_steps, d_steps, rounds = steps
    config = default(model="seqgan", objective="seqgan", optimizer="adversarial")

    model = config.model
    model.vocab_size = vocab_size
    model.max_length = length
    model.num_layers = 1
    model.embed_dim = 32
    model.init_std = 0.1
    model.widths = widths
    model.filters = filters
    model.discriminator_dim = width

    objective = config.objective
    objective.pretrain_steps = pretrain_steps
    objective.discriminator_steps = discriminator_steps
    objective.d_steps = d_steps
    objective.num_rollouts = rollouts

    data = config.data
    data.tokenizer = "bytes"  # of its ids the start of sequences alone is used
    data.train = ("synthetic:oracle:10000",)
    data.validation = ("synthetic:oracle:2000:1",)
    data.length = length
    data.batch_size = 64

    optimizer = config.optimizer
    optimizer.learning_rate = 1e-2
    optimizer.discriminator_learning_rate = rate
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 5.0
    optimizer.schedule.kind = "constant"
    optimizer.schedule.warmup_steps = 0

    config.loader.kind = "thread"  # one cache of the oracle's sequences
    config.train.num_steps = pretrain_steps + discriminator_steps + rounds * (1 + d_steps)
    config.train.eval_every = max(config.train.num_steps // 12, 1)
    config.checkpoint.every = max(config.train.num_steps // 4, 1)

    config.mesh.data = -1
    return config
