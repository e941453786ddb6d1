"""config.json to and from config.model, and the tables of names; no arrays."""

import pytest

from lm.hf import structure, table
from lm.hf.keys import StrictConfigReader
from tests.test_configs import abstract_params, build, load

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def section(tree=LLAMA, **fields):
    found = structure.model_section(tree)
    found.update_from_flattened_dict({key.replace("__", "."): v for key, v in fields.items()})
    return found


@pytest.mark.parametrize(
    "name, size, family",
    [
        ("gpt2", "124m", "gpt2"),
        ("llama3", "8b", "llama"),
        ("llama3", "3.2-1b", "llama"),
        ("mistral", "7b", "mistral"),
        ("mixtral", "8x7b", "mixtral"),
        ("qwen3", "0.6b", "qwen3"),
        ("gemma3", "1b", "gemma3_text"),
        ("gemma3", "27b", "gemma3_text"),
    ],
)
def test_shipped_configs_are_models_of_their_family_and_no_parameter_lacks_a_row(
    name, size, family
):
    model = load(name).get_config(size).model
    assert structure.find_family(model) == family
    resolved = structure.resolve(model)
    params = abstract_params(build(resolved))
    leaves = {path: leaf.shape for path, leaf in flat(params).items()}
    slices = table.parameter_slices(structure.family(family).modules(resolved), leaves)
    shapes = [table.tensor_shape(parts) for parts in table.by_tensor(slices).values()]
    assert sum(size_of(s) for s in shapes) == sum(size_of(s) for s in leaves.values())


def flat(tree, prefix=""):
    found = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        found |= flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return found


def size_of(shape):
    n = 1
    for size in shape:
        n *= size
    return n


@pytest.mark.parametrize(
    "changes, both",
    [
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"hidden_act": "tanh"}, "hidden_act = 'tanh'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.5}}, "1.5"),
        ({"rope_scaling": {"rope_type": "linear"}}, "without factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "bend": 3}}, "bend = 3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"model_type": "mamba"}, "no family 'mamba' in lm/hf; there are: "),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias = True"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
    ],
)
def test_what_can_not_be_represented_here_is_refused_with_its_key_and_value(changes, both):
    with pytest.raises(ValueError) as error:
        section({**LLAMA, **changes})
    assert both in str(error.value)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "max_position_embeddings"])
def test_a_missing_size_is_named(name):
    with pytest.raises(ValueError, match=f"no key {name}"):
        section({key: value for key, value in LLAMA.items() if key != name})


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"activation": "relu2"}, "'relu2'"),
        ({"norm": "layer"}, "config.model.norm = 'layer', LlamaForCausalLM has 'rms'"),
        ({"positions": "alibi"}, "config.model.positions = 'alibi'"),
        ({"logit_softcap": 30.0}, "config.model.logit_softcap = 30.0, LlamaForCausalLM has None"),
        ({"qkv_bias": True}, "config.model.out_bias = False, LlamaForCausalLM has True"),
        ({"parallel_block": True}, "config.model.parallel_block = True"),
        ({"embed_scale": 4.0}, "config.model.embed_scale = 4.0, LlamaForCausalLM has 1.0"),
        ({"moe__num_experts": 4}, "config.model.moe.num_experts = 4, LlamaForCausalLM has None"),
    ],
)
def test_what_a_family_can_not_represent_is_refused_with_both_values(fields, named):
    with pytest.raises(ValueError) as error:
        structure.hf_config(structure.family("llama"), section(**fields))
    assert named in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"dropout": 0.1},
        {"dtype": "bfloat16", "remat": "full", "scan_unroll": 2},
        {"window": 7},  # read by local layers alone, of which there are none
        {"rotary__factor": 8.0},  # read with a scaling alone
        {"num_kv_heads": None, "head_dim": None},
    ],
)
def test_what_makes_no_difference_to_the_function_is_exported(fields):
    tree = structure.hf_config(structure.family("llama"), section(**fields))
    assert {key: tree[key] for key in LLAMA} == LLAMA


def test_a_model_of_no_family_is_refused_with_a_reason_of_each():
    with pytest.raises(ValueError) as error:
        structure.find_family(section(positions="alibi"))
    assert all(f"\n{name}: " in str(error.value) for name in structure.names())


def test_a_parameter_without_a_row_is_named():
    modules = {"a": "theirs.a", "b": "theirs.b"}
    assert table.weight_map(modules, {"a.scale": (2,)}) == {"a.scale": "theirs.a.weight"}
    with pytest.raises(ValueError, match=r"parameters without a row: c\.weight, d"):
        table.weight_map(modules, {"a": (3,), "b.weight": (2, 3), "c.weight": (4,), "d": (4,)})


def test_a_key_of_config_json_that_nobody_reads_is_named():
    keys = StrictConfigReader({"size": 3, "use_cache": True, "bend": 1.5, "curl": 2, "unset": None})
    assert keys.take("size") == 3
    with pytest.raises(ValueError, match=r"here: bend = 1\.5, curl = 2 \("):
        keys.finish()
