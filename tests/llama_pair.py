"""A small Llama with random weights, in PyTorch and here, converted by hand."""

import jax
import numpy as np
import torch
import transformers

from lm.config.schema import MeshConfig
from lm.models import decoder
from lm.parallel.sharding import make_rules

SIZES = {"vocab_size": 24, "max_length": 64, "num_layers": 2, "embed_dim": 16, "mlp_dim": 24}


class Ids:
    """A tokenizer of numbers: each id is a text of its own, '7 ' for 7."""

    name, bos_id, eos_id, pad_id = "ids", 1, 2, 0
    start_ids, stop_ids = (bos_id,), (eos_id,)

    def __init__(self, vocab_size):
        self.vocab_size = self.used_vocab_size = vocab_size

    def encode(self, text):
        return np.array([int(word) for word in text.split()], np.int32)

    def decode_bytes(self, ids):
        return "".join(f"{i} " for i in ids).encode()


def make(seed=0, std=0.6, mesh=(), **changes):
    """(the model of PyTorch, Decoder, its parameters)."""
    sizes = {**SIZES, **changes}
    torch.manual_seed(seed)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=sizes["vocab_size"],
            max_position_embeddings=sizes["max_length"],
            num_hidden_layers=sizes["num_layers"],
            hidden_size=sizes["embed_dim"],
            intermediate_size=sizes["mlp_dim"],
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            initializer_range=std,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            attn_implementation="eager",
        )
    ).eval()
    theirs.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    config = decoder.Config(
        **sizes, num_heads=4, num_kv_heads=2, activation="swiglu", tie_embeddings=False
    )
    devices = jax.devices()[: int(np.prod([n for _, n in mesh], dtype=int))]
    model = decoder.build(config, make_rules(MeshConfig(**{"data": 1, **dict(mesh)}), devices))
    return theirs, model, convert(theirs, config)


def convert(theirs, config):
    """The parameters of a Decoder from those of a LlamaForCausalLM."""
    state = {name: x.detach().numpy() for name, x in theirs.state_dict().items()}

    def stack(name, shape=()):
        layers = [state[f"model.layers.{i}.{name}.weight"].T for i in range(config.num_layers)]
        return np.stack([x.reshape(shape or x.shape) for x in layers])

    width, size = config.embed_dim, config.head_size

    def into(name, heads):
        return {"weight": stack(f"self_attn.{name}_proj", (width, heads, size))}

    out = stack("self_attn.o_proj", (config.num_heads, size, width))
    return {
        "embedding": {"weight": state["model.embed_tokens.weight"]},
        "head": {"weight": state["lm_head.weight"].T},
        "norm": {"scale": state["model.norm.weight"]},
        "layers": {
            "attention": {
                "query": into("q", config.num_heads),
                "key": into("k", config.kv_heads),
                "value": into("v", config.kv_heads),
                "out": {"weight": out},
            },
            "attention_norm": {"scale": stack("input_layernorm")},
            "mlp": {name: {"weight": stack(f"mlp.{name}_proj")} for name in ("gate", "up", "down")},
            "mlp_norm": {"scale": stack("post_attention_layernorm")},
        },
    }
