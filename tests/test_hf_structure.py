"""config.json to and from config.model, and the tables of names."""

import pytest

from lm import config as configs
from lm.hf import structure, table
from lm.hf.table import LINEAR, Row
from tests.hf_models import CASES
from tests.test_configs import load

HF = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "rope_theta": 10_000.0,
}


def changed(**fields):
    config = configs.default()
    config.model = structure.model_section(HF)
    config.model.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config.model
