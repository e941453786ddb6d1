"""Variational autoencoders of sentences (arXiv:1511.06349).

    configs/vae.py:tatoeba    also ptb, yahoo

tatoeba (0.41M parameters, 16 numbers of a latent) reads the English sentences of Tatoeba's pairs in
minutes on a core; docs/latent.md has its figures. ptb has the sizes that Bowman et al. chose for
the Penn Treebank (section 3 of the paper: embeddings of 353, an LSTM of 191, a latent of 13; they
report 101 nats per sentence, 2 of them divergence, against 100 by an LSTM alone), yahoo those of
He et al. 2019 for 100,000 answers (arXiv:1901.05534: 512, 1,024, 32, 16 epochs by SGD; a bound of
328 nats with a divergence of 5.6 by their schedule). Two things differ: the latent is added to
every input of the decoder, and documents are packed. The latter two were not run here.

    python scripts/train_tokenizer.py --data=sentences.txt --separator='\\n' --vocab-size=1023 \\
        --out=data/tatoeba/tokenizer.model
    python scripts/prepare_data.py --data=sentences.txt --separator='\\n' \\
        --tokenizer=data/tatoeba/tokenizer.model --validation-fraction=0.1 --out=data/tatoeba
    python scripts/train.py --config=configs/vae.py --workdir=runs/vae

where sentences.txt has a sentence on each line: `cut -f1 cmn.txt | uniq`.
"""

from lm.config.conversion import default

# embed_dim, hidden_dim, latent_dim, vocab_size, length, rows, steps, anneal_steps
SIZES = {
    "tatoeba": (96, 128, 16, 1024, 32, 32, 1500, 500),
    "ptb": (353, 191, 13, 10_240, 128, 32, 40_000, 10_000),
    "yahoo": (512, 1024, 32, 20_480, 256, 32, 50_000, 10_000),
}


def get_config(arg=None):
    size = arg or "tatoeba"
    if size not in SIZES:
        raise ValueError(f"configs/vae.py:{size} is not a size; there are: {', '.join(SIZES)}")
    embed_dim, hidden_dim, latent_dim, vocab_size, length, rows, steps, anneal = SIZES[size]
    config = default(model="vae", objective="vae")

    model = config.model
    model.vocab_size = vocab_size
    model.num_layers = 1
    model.embed_dim = embed_dim
    model.hidden_dim = hidden_dim
    model.latent_dim = latent_dim
    model.init_std = None

    objective = config.objective
    objective.anneal_steps = anneal
    objective.free_bits = 0.2
    objective.word_dropout = 0.3

    data = config.data
    data.tokenizer = f"data/{size}/tokenizer.model"
    data.train = (f"data/{size}/train",)
    data.validation = (f"data/{size}/validation",)
    data.length = length
    data.encoder_length = length
    data.batch_size = rows
    data.packing = "best_fit"  # a sentence is not cut

    optimizer = config.optimizer
    optimizer.learning_rate = 3e-3
    optimizer.weight_decay = 0.0
    optimizer.schedule.warmup_steps = 100

    config.train.num_steps = steps
    config.train.eval_every = steps // 3
    config.checkpoint.every = steps // 3

    config.mesh.data = -1
    return config
