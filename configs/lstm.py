"""LSTM language models of words, as published for WikiText-2 and the Penn Treebank.

    configs/lstm.py:small    also medium, large

small (two layers of width 200, 7.3M parameters) is the model of PyTorch's word_language_model
example (https://github.com/pytorch/examples), with its recipe: SGD without momentum at a rate of
20, gradients clipped at 0.25, dropout 0.2, 35 words through which gradients go, 20 rows. Published
test perplexity on WikiText-2, by that example's README: 117.61 after 6 epochs, 110.44 with tied
weights, 87.17 tied after 40 epochs. medium and large (650 and 1,500 wide) are those of Zaremba et
al. 2014 (arXiv:1409.2329), with tied weights (arXiv:1608.05859), their dropout and clipping.

What differs: there, the state travels from batch to batch and the rate is divided by 4 where
the validation loss rises. Here a row begins with an empty state, so that a run is a function of
its config and step: the state travels in rows of 70 words, 16 of which make a step; gradients stop
every 35 words, and the rate falls along a cosine. Not run here.

    python scripts/train_tokenizer.py --data=wikitext-2/train.txt.gz --validation-fraction=0 \\
        --model-type=word --vocab-size=33278 --out=data/wikitext2/words.json
    for split in train valid test; do python scripts/prepare_data.py \\
        --data="wikitext-2/$split.txt*" --validation-fraction=0 \\
        --tokenizer=data/wikitext2/words.json --out=data/wikitext2/$split; done
    python scripts/train.py --config=configs/lstm.py:small --workdir=runs/lstm
    python scripts/evaluate.py --workdir=runs/lstm --data=data/wikitext2/test/train --length=1024
"""

from lm.config.conversion import default

# embed_dim, dropout, clip_norm
SIZES = {
    "small": (200, 0.2, 0.25),
    "medium": (650, 0.5, 5.0),
    "large": (1500, 0.65, 10.0),
}


def get_config(arg=None):
    size = arg or "small"
    if size not in SIZES:
        raise ValueError(f"configs/lstm.py:{size} is not a size; there are: {', '.join(SIZES)}")
    embed_dim, dropout, clip_norm = SIZES[size]
    config = default(model="lstm", objective="causal")

    model = config.model
    model.vocab_size = 33_280  # 33,278 words, and divisible by 8
    model.num_layers = 2
    model.embed_dim = embed_dim
    model.tie_embeddings = True
    model.dropout = dropout
    model.bptt = 35
    model.scan_unroll = -1

    data = config.data
    data.tokenizer = "data/wikitext2/words.json"
    data.train = ("data/wikitext2/train/train",)
    data.validation = ("data/wikitext2/valid/train",)
    data.length = 70
    data.batch_size = 16

    optimizer = config.optimizer
    optimizer.name = "sgd"
    optimizer.learning_rate = 20.0 if size == "small" else 1.0
    optimizer.b1 = 0.0
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = clip_norm
    optimizer.schedule.kind = "cosine"
    optimizer.schedule.final_fraction = 0.01

    config.train.num_epochs = 40.0
    config.train.eval_every = 1865  # an epoch
    return config
