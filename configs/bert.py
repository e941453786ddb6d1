"""BERT (Devlin et al., arXiv:1810.04805), uncased, pretrained by masked tokens.

    configs/bert.py:base    also large

Shapes: section 3 of the paper. 109,482,240 and 335,141,888 parameters with the pooler, as in the
published checkpoints, and 622,650 and 1,082,170 in the head of the masked-LM objective, whose
projection is the embedding.

Recipe: section A.2: 256 rows of 512 tokens, 1,000,000 steps, Adam at 1e-4 with 10,000 steps of
warm-up and linear decay to zero, weight decay 0.01 but for biases and norms, dropout 0.1 also of
attention weights; 15% of the tokens are predicted, of which 80% are masked, 10% random and 10% as
they were. Four things differ. There is no next-sentence prediction, which doesn't pay
(arXiv:1907.11692), so that the pooler stays as it was drawn until a task trains it. All steps have
512 tokens, where the paper's first 900,000 had 128. Rows are packed from documents. Gradients are
clipped to 1, as the published code does. The base model took four days on 16 TPU v2 chips. Not run
here.

With the `tokenizer.json` of Hugging Face's bert-base-uncased and a token store at the paths below:

    python scripts/train.py --config=configs/bert.py:base --workdir=runs/bert-base
"""

from lm.config.conversion import default

# num_layers, embed_dim, num_heads
SIZES = {"base": (12, 768, 12), "large": (24, 1024, 16)}


def get_config(arg=None):
    size = arg or "base"
    if size not in SIZES:
        raise ValueError(f"configs/bert.py:{size} is not a size; there are: {', '.join(SIZES)}")
    num_layers, embed_dim, num_heads = SIZES[size]
    config = default(model="encoder", objective="mlm")

    model = config.model
    model.vocab_size = 30522
    model.max_length = 512
    model.num_layers = num_layers
    model.embed_dim = embed_dim
    model.num_heads = num_heads
    model.num_types = 2
    model.pooler_dim = embed_dim
    model.activation = "gelu"
    model.norm = "layer"
    model.norm_placement = "post"
    model.norm_eps = 1e-12
    model.norm_bias = True
    model.positions = "learned"
    model.qkv_bias = True
    model.out_bias = True
    model.mlp_bias = True
    model.dropout = 0.1
    model.attention_dropout = 0.1
    model.init_std = 0.02
    model.dtype = "bfloat16"
    model.remat = "none" if size == "base" else "projections"

    objective = config.objective
    objective.rate = 0.15
    objective.mask_fraction = 0.8
    objective.random_fraction = 0.1

    data = config.data
    data.tokenizer = "data/bert/tokenizer.json"
    data.train = ("data/bert/train",)
    data.validation = ("data/bert/validation",)
    data.length = 512
    data.batch_size = 256

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = 1e-4
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-6
    optimizer.weight_decay = 0.01
    optimizer.decay_roles = ("matrix", "embedding")
    optimizer.clip_norm = 1.0
    optimizer.schedule.kind = "linear"
    optimizer.schedule.warmup_steps = 10_000
    optimizer.schedule.final_fraction = 0.0

    train = config.train
    train.num_steps = 1_000_000
    train.eval_every = 5000
    train.eval_batches = 100
    config.checkpoint.every = 5000

    config.mesh.data = 1  # parameters and optimizer spread over all devices
    config.mesh.fsdp = -1
    return config
