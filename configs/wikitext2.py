"""WikiText-2 by words (Merity et al. 2016): an LSTM beside a decoder of equal parameters.

    configs/wikitext2.py:lstm    also decoder, conv

Two layers of width 200 and a tied table of 33,278 words: 7.3M parameters each. Every word of the
text is read once, in 2,983 steps of 10 rows of 70 words: an hour of one CPU core at 580 words/s, of
which nine tenths are the products of the vocabulary. A tenth of that is in docs/tasks.md.

With the stores of configs/lstm.py:

    python scripts/train.py --config=configs/wikitext2.py:lstm --workdir=runs/wikitext2-lstm
    python scripts/evaluate.py --workdir=runs/wikitext2-lstm --data=data/wikitext2/test/train
"""

from lm.config.conversion import default

MODELS = ("lstm", "decoder", "conv")


def get_config(arg=None):
    name = arg or "lstm"
    if name not in MODELS:
        raise ValueError(
            f"configs/wikitext2.py:{name} is not a model; there are: {', '.join(MODELS)}"
        )
    config = default(model=name, objective="causal")

    model = config.model
    model.vocab_size = 33_280
    model.num_layers = 2
    model.embed_dim = 200
    model.tie_embeddings = True
    model.dropout = 0.0  # no word is seen twice
    model.scan_unroll = -1
    if name == "decoder":
        model.max_length = 2048
        model.num_heads = 4
        model.mlp_dim = 400
        model.init_std = 0.02

    data = config.data
    data.tokenizer = "data/wikitext2/words.json"
    data.train = ("data/wikitext2/train/train",)
    data.validation = ("data/wikitext2/valid/train",)
    data.length = 70
    data.batch_size = 10

    config.loader.kind = "thread"
    config.loss.chunk_size = 100  # a fifth faster than 700: logits that stay in the cache

    optimizer = config.optimizer
    optimizer.weight_decay = 0.0
    optimizer.schedule.kind = "linear"
    optimizer.schedule.final_fraction = 0.02
    if name == "lstm":  # the published rule; AdamW stays at the frequencies of words for longer
        optimizer.name = "sgd"
        optimizer.learning_rate = 20.0
        optimizer.b1 = 0.0
        optimizer.clip_norm = 0.25
    else:
        optimizer.name = "adamw"
        optimizer.learning_rate = 2e-3
        optimizer.b2 = 0.99
        optimizer.clip_norm = 1.0
        optimizer.schedule.warmup_steps = 100

    config.train.num_epochs = 1.0
    return config
