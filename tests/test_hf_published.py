"""Published config.json files: every key of them is known, and models made of them compute the same
here as in `transformers`.
"""

import json
import re

import jax
import numpy as np
import pytest

from lm.generation.generator import Generator
from lm.generation.score import Scorer
from lm.hf import structure
from lm.hf.exporting import export_folder
from tests import hf_models
from tests.published_configs import CONFIGS, FAMILIES, shrunken
from tests.test_hf import LOGITS, bring, difference, own_logits

torch = pytest.importorskip("torch", reason="parity needs PyTorch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")
safetensors = pytest.importorskip("safetensors.torch", reason="parity needs safetensors")


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
    texts = structure.families().keys() - {"clip", "siglip", "vit"}  # tests/test_hf_pictures.py
    assert named.keys() == FAMILIES.keys() == texts


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


@pytest.fixture(scope="module")
def made(tmp_path_factory, devices):
    """(name of a config, changes, a class in place of that in `architectures`) -> that model of
    `transformers` with random weights, in a folder beside the published config.json, and imported.
    """

    def make(name, kind="", **changes):
        tree = shrunken(name, **changes)
        folder = tmp_path_factory.mktemp("made")
        if kind:
            tree["architectures"] = [kind]
        (folder / "theirs").mkdir()
        (folder / "theirs" / "config.json").write_text(json.dumps(tree))
        config = transformers.AutoConfig.from_pretrained(folder / "theirs")
        torch.manual_seed(0)
        config._attn_implementation = "eager"
        theirs = getattr(transformers, tree["architectures"][0])(config).eval().float()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        theirs.save_pretrained(folder / "theirs")
        (folder / "theirs" / "config.json").write_text(json.dumps(tree))
        return bring(folder, theirs, devices)

    return make


def own_hidden(case, tokens):
    def run(params, tokens):
        return case.experiment.model.apply({"params": params}, tokens).hidden

    return np.asarray(jax.jit(run)(case.params, tokens))


@pytest.mark.parametrize("name", FAMILIES.values())
def test_logits_of_a_published_config_equal_theirs(name, made, pack):
    case = made(name)
    tokens = pack([(20,)], length=20, vocab_size=264)
    if case.theirs.config.is_encoder_decoder:
        sources = pack([(20,)], length=20, vocab_size=264, seed=1)

        def run(params, sources, targets):
            model = case.experiment.model
            hidden = model.apply({"params": params}, targets, encoder=sources).hidden
            return model.apply({"params": params}, hidden, method="logits")

        found = np.asarray(jax.jit(run)(case.params, sources, tokens))
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor(sources.ids, dtype=torch.long)}
            decoder = torch.tensor(tokens.ids, dtype=torch.long)
            wanted = case.theirs(**inputs, decoder_input_ids=decoder).logits.numpy()
    else:
        found, wanted = own_logits(case, tokens), hf_models.logits(case.theirs, tokens.ids)
    assert difference(found, wanted) < LOGITS


HEADLESS = {
    "bert": ("all-MiniLM-L6-v2", "BertModel", {}),
    "llama": ("TinyLlama-1.1B", "LlamaModel", {}),
    "qwen2": ("Qwen2.5-0.5B", "Qwen2Model", {"tie_word_embeddings": False}),
    "mistral": ("Mistral-7B-v0.1", "MistralModel", {}),
    "gpt2": ("gpt2-medium", "GPT2Model", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("family", HEADLESS)
def test_a_model_without_head_gives_their_hidden_states_and_goes_back_as_it_came(
    family, made, pack, tmp_path
):
    name, kind, changes = HEADLESS[family]
    case = made(name, kind, **changes)
    assert not case.experiment.config.model.has_head
    tokens = pack([(20,)], length=20, vocab_size=264)
    with torch.no_grad():
        ids = torch.tensor(tokens.ids, dtype=torch.long)
        wanted = case.theirs(ids).last_hidden_state.numpy()
    assert difference(own_hidden(case, tokens), wanted) < LOGITS
    export_folder(case.experiment, case.params, str(tmp_path / "out"), say=lambda line: None)
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [kind]
    before, after = (
        safetensors.load_file(f"{folder}/model.safetensors")
        for folder in (case.folder, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(before[key].numpy().tobytes() == after[key].numpy().tobytes() for key in before)


def test_what_needs_the_missing_head_is_refused_and_names_it(made):
    case = made("TinyLlama-1.1B", "LlamaModel")
    experiment = case.experiment.variant({"data.train": ("synthetic:markov",)})
    parts = experiment.model, case.params, experiment.tokenizer
    for use in (
        lambda: experiment.train_data,
        lambda: experiment.lower_train_step(),
        lambda: Generator(*parts),
        lambda: Scorer(*parts),
        lambda: experiment.model.apply(
            {"params": case.params}, np.zeros((1, 1, 16)), method="logits"
        ),
    ):
        with pytest.raises(ValueError, match=r"config\.model\.has_head is False"):
            use()


def test_a_run_begins_with_a_model_without_head_and_a_head_of_its_own(made, devices):
    case = made("all-MiniLM-L6-v2", "BertModel")
    new = ("transform.*", "transform_norm.*", "logit_bias")
    changes = {"model.has_head": True, "init.from_": case.workdir, "init.new": new}
    experiment = case.experiment.variant({**changes, "data.train": ("synthetic:markov",)})
    state = experiment.init_state()
    ours = state.params["embedding"]["weight"], case.params["embedding"]["weight"]
    assert np.array_equal(*map(np.asarray, ours))
    assert np.asarray(state.params["transform"]["weight"]).std() > 0


def test_a_head_that_its_class_has_and_its_files_lack_is_named(made, tmp_path, devices):
    case = made("TinyLlama-1.1B")
    tensors = safetensors.load_file(f"{case.folder}/model.safetensors")
    del tensors["lm_head.weight"]
    safetensors.save_file(tensors, f"{case.folder}/model.safetensors")
    with pytest.raises(ValueError, match=r"without a tensor: lm_head\.weight"):
        bring(tmp_path, None, devices, source=case.folder)


def test_the_text_model_of_gemma_3_is_imported_from_names_of_both_releases(made, tmp_path, devices):
    """Vision is left out, and that is told; what is exported is the text model."""
    case = made("gemma-3-27b-it")
    tensors = safetensors.load_file(f"{case.folder}/model.safetensors")
    assert any(name.startswith("language_model.model.") for name in tensors)
    said = []
    renamed = {
        re.sub(r"^(language_model\.model|vision_tower|multi_modal_projector)\.", _in_model, name): x
        for name, x in tensors.items()
    }
    assert any(name.startswith("model.language_model.") for name in renamed)
    safetensors.save_file(renamed, f"{case.folder}/model.safetensors")
    again = bring(tmp_path, None, devices, source=case.folder, say=said.append)
    left = sum("vision" in name or "multi_modal" in name for name in tensors)
    assert f"left out: {left} tensors beside those of the text model" in said[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, case.params, again.params))
    assert export_folder(case.experiment, case.params, str(tmp_path / "out")) == "gemma3_text"


def _in_model(found):
    return f"model.{'language_model' if 'language' in found[1] else found[1]}."
