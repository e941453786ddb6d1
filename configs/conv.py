"""Gated convolutional language models (Dauphin et al. 2017, arXiv:1612.08083).

    configs/conv.py:gcnn8    also gcnn14

Shapes after the WikiText-103 models of the paper's table 1, without their bottlenecks, all layers
of one width: 8 convolutions of 4 words and 14 of 5, so that a word sees 24 and 56 before it. The
paper's vocabulary of 267,735 words with an adaptive softmax is here one of 50,304 pieces, its
weight normalisation a norm of each layer's input, its Nesterov momentum AdamW. Published test
perplexities, by words of WikiText-103: 44.9 (GCNN-8) and 37.2 (GCNN-14). Not run here.

    python scripts/train.py --config=configs/conv.py:gcnn8 --workdir=runs/gcnn8
"""

from lm.config.conversion import default

# num_layers, embed_dim, kernel_size
SIZES = {"gcnn8": (8, 896, 4), "gcnn14": (14, 848, 5)}


def get_config(arg=None):
    size = arg or "gcnn8"
    if size not in SIZES:
        raise ValueError(f"configs/conv.py:{size} is not a size; there are: {', '.join(SIZES)}")
    num_layers, embed_dim, kernel_size = SIZES[size]
    config = default(model="conv", objective="causal")

    model = config.model
    model.vocab_size = 50_304
    model.num_layers = num_layers
    model.embed_dim = embed_dim
    model.kernel_size = kernel_size
    model.tie_embeddings = True
    model.dropout = 0.1
    model.dtype = "bfloat16"

    data = config.data
    data.tokenizer = "data/gpt2/tokenizer.json"
    data.train = ("data/wikitext103/train",)
    data.validation = ("data/wikitext103/validation",)
    data.length = 512
    data.batch_size = 128

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = 1e-3
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 0.1
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.warmup_steps = 500

    config.train.num_epochs = 20.0
    config.train.eval_every = 1000
    return config
