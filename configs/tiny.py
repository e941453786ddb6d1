"""The default run: a small decoder on the source of Python's standard library, in minutes on a CPU.

Four layers of width 128 with rotary positions, RMS norms, normalised queries and keys and squared
ReLU (arXiv:2109.08668); matrices by Muon (arXiv:2502.16982), the rest by Adam. 4,096 BPE pieces
that may span words. 1.5M tokens, 0.6 of an epoch, so that two slow cores need no more than six
minutes: 1.774 bits per byte. Fast cores have time for `--config.train.num_steps=600`: 1.587.

Hardware: two CPU cores, three to six minutes. Expected: docs/results.md has the measured figures.

    make pretrain

or by hand:

    python scripts/train_tokenizer.py --data=stdlib --out=data/stdlib/tokenizer.model
    python scripts/prepare_data.py --data=stdlib --tokenizer=data/stdlib/tokenizer.model \\
        --out=data/stdlib
    python scripts/train.py --config=configs/tiny.py --workdir=runs/tiny-stdlib
"""

from lm.config.conversion import default


def get_config(arg=None):
    if arg is not None:
        raise ValueError(f"configs/tiny.py has one size, got {arg!r}")
    config = default(model="decoder", objective="causal")

    config.data.tokenizer = "data/stdlib/tokenizer.model"
    config.data.train = ("data/stdlib/train",)
    config.data.validation = ("data/stdlib/validation",)
    config.data.length = 256
    config.data.batch_size = 16

    config.loader.kind = "thread"  # TensorFlow's import would be half of the time to the first step

    model = config.model
    model.vocab_size = 4096
    model.max_length = 256
    model.num_layers = 4
    model.embed_dim = 128
    model.num_heads = 4
    model.activation = "relu2"
    model.qk_norm = True
    model.scan_unroll = -1  # on a CPU a loop over layers costs a tenth of the speed

    config.loss.chunk_size = 512  # logits that stay in the cache

    optimizer = config.optimizer
    optimizer.name = "muon"
    optimizer.learning_rate = 3e-3
    optimizer.muon_learning_rate = 2e-2
    optimizer.b2 = 0.99
    optimizer.weight_decay = 0.0
    optimizer.schedule.kind = "linear"
    optimizer.schedule.warmup_steps = 20
    optimizer.schedule.final_fraction = 0.02

    config.train.num_steps = 360
    config.train.eval_every = 120
    config.checkpoint.every = 120
    return config
