"""Published config.json files: every key of them is known, and models made of them compute the same
here as in `transformers`.
"""

import pytest

from lm.hf import structure
from lm.hf.nested import NESTED
from tests.published_configs import CONFIGS, FAMILIES, shrunken


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_json_is_read_whole(name):
    """No key of it is refused, and sizes are those that it says."""
    tree = CONFIGS[name]
    section = structure.model_section(tree)
    text = tree.get("text_config", tree)
    sizes = {"vocab_size": section.vocab_size, "num_key_value_heads": section.get("num_kv_heads")}
    sizes |= dict.fromkeys(("hidden_size", "n_embd", "d_model"), section.embed_dim)
    sizes |= dict.fromkeys(("num_hidden_layers", "n_layer"), section.num_layers)
    sizes |= dict.fromkeys(("max_position_embeddings", "n_positions"), section.max_length)
    found = {key: size for key, size in sizes.items() if key in text}
    assert len(found) >= 2 and found == {key: text[key] for key in found}


def test_every_family_has_a_published_config():
    named = {CONFIGS[name]["model_type"]: name for name in FAMILIES.values()}
    assert named.keys() == FAMILIES.keys() == {*structure.names(), *NESTED}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_commit_hash", "060db6499f32"),
        ("auto_map", {"AutoModel": "modeling_own.Own"}),
        ("_model_name_or_path", "mine"),
        ("num_labels", 3),
        ("_attn_implementation_autoset", True),
        ("unsloth_whatever", 1),
        ("sep_token_id", 102),
        ("repetition_penalty", 1.0),
        ("is_decoder", False),
        ("pruned_heads", {}),
        ("sliding_window", None),
        ("quantization_config", None),
        ("attention_bias", None),
    ],
)
def test_a_key_that_can_not_change_a_number_is_read_over(key, value):
    tree = {**shrunken("TinyLlama-1.1B"), key: value}
    assert structure.model_section(tree) == structure.model_section(shrunken("TinyLlama-1.1B"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_decoder", True),
        ("pruned_heads", {"0": [1]}),
        ("add_cross_attention", True),
        ("sliding_window", 128),
        ("residual_multiplier", 0.22),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_a_key_that_may_change_a_number_is_refused_unless_it_is_named(key, value):
    tree = {**shrunken("TinyLlama-1.1B"), key: value}
    with pytest.raises(ValueError, match=rf"{key} = .*--ignore-key"):
        structure.model_section(tree)
    said = []
    found = structure.model_section(tree, ignored=[key], say=said.append)
    assert found == structure.model_section(shrunken("TinyLlama-1.1B"))
    assert said == [f"ignored in config.json: {key} = {value!r}"]


def test_a_key_to_ignore_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"--ignore-key=rope: config\.json has no such key"):
        structure.model_section(shrunken("TinyLlama-1.1B"), ignored=["rope"])


@pytest.mark.parametrize(
    ("name", "key", "activation"),
    [
        ("gpt2-medium", "activation_function", "silu"),
        ("bert-base-chinese", "hidden_act", "silu"),
        ("Llama-3.2-1B", "hidden_act", "swiglu"),
        ("gemma-3-1b-it", "hidden_activation", "swiglu"),
        ("t5-small", "feed_forward_proj", "silu"),
    ],
)
def test_swish_is_silu(name, key, activation):
    found = structure.model_section({**shrunken(name), key: "swish"})
    assert found.activation == activation
    family = structure.family(CONFIGS[name]["model_type"])
    assert structure.hf_config(family, found)[key] == "silu"  # as transformers writes it


def test_dropouts_of_gpt2_that_differ_are_told():
    said = []
    tree = {**CONFIGS["gpt2-medium"], "embd_pdrop": 0.0}
    assert structure.model_section(tree, say=said.append).dropout == 0.1
    assert len(said) == 1 and "embd_pdrop (0.0)" in said[0] and "resid_pdrop (0.1)" in said[0]
    structure.model_section(CONFIGS["gpt2-medium"], say=said.append)
    assert len(said) == 1


def test_two_names_of_a_size_must_agree():
    with pytest.raises(ValueError, match=r"hidden_size = 512.*768"):
        structure.model_section({**CONFIGS["chatterbox-gpt2"], "hidden_size": 512})
