"""The default pretraining run: a small decoder on Python's own standard library source, minutes on two CPU cores."""

from lm.config import default


def get_config(arg=None):
    config = default(model="decoder", objective="causal")
    config.data.tokenizer = "data/stdlib/tokenizer.model"
    config.data.train = ("data/stdlib/train",)
    config.data.validation = ("data/stdlib/validation",)
    config.data.length = 256
    config.data.batch_size = 16

    model = config.model
    model.vocab_size = 4096
    model.max_length = 256
    model.num_layers = 4
    model.embed_dim = 128
    model.num_heads = 4

    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule.warmup_steps = 50
    config.train.num_steps = 1000
    config.checkpoint.every_seconds = 60.0
    return config
