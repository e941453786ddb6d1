"""DALL-E: pictures from captions, as the codes of a VQ-VAE (configs/vqvae.py).

    configs/dalle.py:shapes    also shapes-mini, mini, 12b

shapes draws synthetic:shapes: a decoder of captions in bytes and 8 x 8 of 128 codes. shapes-mini is
the same as an encoder-decoder. docs/images.md has the commands from the VQ-VAE on, what they draw,
and how many of the drawings are right.

12b has the sizes of the paper (arXiv:2102.12092, sections 2.2 and 2.3, appendix B): 64 layers of
width 3968 with 62 heads of 64, captions of at most 256 of 16,384 tokens, 32 x 32 of 8,192 codes,
batches of 1,024, 430,000 steps, weight decay 0.045, gradients clipped at 4, b2 0.96. Four things
differ: attention is dense, where the paper's is sparse, along rows, columns and convolutions; a
position of the grid has one learned vector, not one for its row and one for its column; Adam's
moments are float32, not 16 bits; and the learning rate decays by a cosine, where the paper halved
it by hand. mini has the sizes of DALL-E mini's encoder-decoder, BART-large (arXiv:1910.13461), with
captions of 64 tokens and 16 x 16 of 16,384 codes. Neither was run here.

    python scripts/train.py --config=configs/dalle.py --workdir=runs/dalle
"""

from lm.config.conversion import default

# num_layers, embed_dim, num_heads, mlp_dim; ids of text, codes, tokens of a caption, grid
SIZES = {
    "shapes": (4, 128, 4, 512, 264, 128, 48, 8),
    "shapes-mini": (3, 128, 4, 512, 264, 128, 48, 8),
    "mini": (12, 1024, 16, 4096, 50_272, 16_384, 64, 16),
    "12b": (64, 3968, 62, 15_872, 16_384, 8192, 256, 32),
}


def get_config(arg=None):
    size = arg or "shapes"
    if size not in SIZES:
        raise ValueError(f"configs/dalle.py:{size} is not a size; there are: {', '.join(SIZES)}")
    layers, width, heads, mlp, text_ids, num_codes, caption_length, grid = SIZES[size]
    has_encoder, is_small = size.endswith("mini"), size.startswith("shapes")
    config = default(model="encoder_decoder" if has_encoder else "decoder", objective="dalle")

    objective = config.objective
    objective.grid_size = grid
    objective.num_codes = num_codes
    objective.caption_dropout = 0.1

    model = config.model
    model.vocab_size = text_ids + num_codes
    model.num_layers = layers
    model.embed_dim = width
    model.num_heads = heads
    model.head_dim = width // heads
    model.mlp_dim = mlp
    model.positions = "learned"
    model.activation = "gelu"
    model.tie_embeddings = False

    data = config.data
    data.length = grid**2 if has_encoder else caption_length + grid**2
    data.encoder_length = caption_length if has_encoder else None
    model.max_length = max(data.length, caption_length)
    name = "shapes-codes" if is_small else "dalle"
    data.train = (f"data/{name}/train",)
    data.validation = (f"data/{name}/validation",)

    optimizer, train = config.optimizer, config.train
    if is_small:
        data.batch_size = 64
        optimizer.learning_rate = 2e-3
        optimizer.schedule.warmup_steps = 100
        train.num_steps = 1500
        train.eval_every = 500
        return config

    data.tokenizer = "data/dalle/tokenizer.model"
    data.batch_size = 1024
    model.dtype = "bfloat16"
    model.remat = "full" if size == "12b" else "projections"
    optimizer.learning_rate = 4.5e-4
    optimizer.b2 = 0.96
    optimizer.weight_decay = 0.045
    optimizer.clip_norm = 4.0
    optimizer.schedule.warmup_steps = 5000
    train.num_steps = 430_000
    train.eval_every = 10_000
    train.eval_batches = 10
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
