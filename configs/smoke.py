"""A run of seconds on synthetic data, to try a machine, a launcher or a change of the code.

    python scripts/train.py --config=configs/smoke.py --workdir=runs/smoke

33 thousand parameters and 200 steps: a few seconds on any machine, without any file to prepare. The
loss falls from 5.6 to 2.3 nats per token; what is learnt is of no use.
"""

from lm.config.conversion import default


def get_config(arg: str | None = None):
    if arg is not None:
        raise ValueError(f"configs/smoke.py has one size, got {arg!r}")
    config = default()
    config.data.train = ("synthetic:markov:4096",)
    config.data.validation = ("synthetic:markov:40:7",)
    config.data.length = 32
    config.data.batch_size = 8
    model = config.model
    model.vocab_size, model.max_length = 264, 32
    model.num_layers, model.embed_dim, model.num_heads = 2, 32, 4
    model.dropout = 0.1
    config.loader.kind = "thread"  # TensorFlow's import would be most of the time
    config.optimizer.learning_rate = 3e-3
    config.optimizer.ema_decay = 0.99
    config.train.num_steps = 200
    config.train.log_every = 1
    config.checkpoint.every = 20
    config.log.trackers = ("jsonl",)
    return config
