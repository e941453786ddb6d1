"""CLIP, SigLIP and ViT of `transformers`: logits of random weights both ways, and published
config.json files.
"""

import copy
import json
import re

import jax
import numpy as np
import pytest

from lm.config import conversion
from lm.hf import structure
from lm.hf.exporting import export_folder
from lm.hf.importing import import_folder
from lm.models import flops
from lm.training.restore import restore_params
from lm.training.stored_run import load
from lm.types import Tokens

torch = pytest.importorskip("torch", reason="parity needs PyTorch")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")
pytest.importorskip("safetensors.torch", reason="parity needs safetensors")

LOGITS = 2e-5  # of the largest
LENGTH, EOS, SIZE = 11, 258, 16  # three patches of 5 and a pixel that none of them has
VISION = {
    "hidden_size": 18,
    "intermediate_size": 25,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": SIZE,
    "patch_size": 5,
}
TEXT = {
    "hidden_size": 20,
    "intermediate_size": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "max_position_embeddings": LENGTH,
    "vocab_size": 259,
    "eos_token_id": EOS,
    "pad_token_id": 256,
}
PAIR = {"vision_config": VISION, "text_config": TEXT}
GELU = {"hidden_act": "gelu"}
CASES = {
    "clip": ("CLIP", {**PAIR, "projection_dim": 13}),
    "clip_gelu": (
        "CLIP",
        {"vision_config": VISION | GELU, "text_config": TEXT | GELU, "projection_dim": 13},
    ),
    "siglip": ("Siglip", {"vision_config": VISION, "text_config": {**TEXT, "projection_size": 18}}),
    "vit": ("ViT", VISION),
    "vit_classes": ("ViT", {**VISION, "num_labels": 7, "hidden_act": "gelu_pytorch_tanh"}),
}


def make(name):
    kind, values = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**values)
    ends = "ForImageClassification" if name == "vit_classes" else "Model"
    model = getattr(transformers, f"{kind}{ends}")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, x in model.named_parameters():
            mean = float("norm" in key and key.endswith("weight")) + 2.0 * (key == "logit_scale")
            x.normal_(mean, 0.3, generator=generator)
    return model


def inputs():
    rng = np.random.default_rng(0)
    segments = (np.arange(LENGTH) < np.array([[11], [3], [1], [7]])).astype(np.int32)
    ids = rng.integers(0, 256, segments.shape).astype(np.int32) * segments
    ids[np.arange(4), segments.sum(1) - 1] = EOS
    images = rng.integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)
    return Tokens(ids, segments, np.arange(LENGTH, dtype=np.int32) * segments), images


def their_logits(model, config):
    """Logits of all pictures with all texts, or of classes; else the pooled output."""
    tokens, images = inputs()
    pixels = (images / np.float32(255) - np.float32(config.image_mean)) / config.image_std
    given = {"pixel_values": torch.tensor(np.float32(pixels)).permute(0, 3, 1, 2)}
    kind = model.config.model_type
    if kind != "vit":
        ids = np.where(tokens.segments, tokens.ids, 256)  # texts are filled up
        given["input_ids"] = torch.tensor(ids, dtype=torch.long)
    if kind == "clip":
        given["attention_mask"] = torch.tensor(tokens.segments)
    with torch.no_grad():
        out = model(**given)
    if kind != "vit":
        return out.logits_per_image.numpy()
    return (out.logits if "logits" in out else out.pooler_output).numpy()


def own_logits(experiment, params):
    tokens, images = inputs()
    model = experiment.model

    def run(params):
        hidden = model.apply({"params": params}, tokens, images=images).hidden
        has_head = getattr(model.config, "has_head", True)
        method = "logits" if has_head else "pooled"
        return model.apply({"params": params}, hidden, method=method)

    return np.asarray(jax.jit(run)(params)).reshape(4, -1)


def bring(source, workdir, device, **options):
    config = conversion.default()
    config.update_from_flattened_dict(
        {"data.length": LENGTH, "data.batch_size": 4, "train.num_steps": 20}
    )
    options = {"tokenizer": "bytes", "say": lambda line: None, **options}
    import_folder(str(source), str(workdir), config, [device], **options)
    experiment = load(str(workdir), [device])
    return experiment, restore_params(experiment, str(workdir))[1]


@pytest.fixture(scope="module")
def imported(tmp_path_factory, devices):
    """name -> (model of transformers, its folder, experiment, parameters); each is made once."""
    made = {}

    def one(name):
        if name not in made:
            theirs, folder = make(name), tmp_path_factory.mktemp(name)
            theirs.save_pretrained(folder / "theirs")
            found = bring(folder / "theirs", folder / "run", devices[0])
            made[name] = theirs, folder / "theirs", *found
        return made[name]

    return one


def difference(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "clip_gelu" else ()) for n in CASES]
)
def test_logits_are_theirs_both_ways(imported, name, tmp_path):
    theirs, folder, experiment, params = imported(name)
    wanted = their_logits(theirs, experiment.config.model)
    assert np.abs(wanted - wanted[0]).max() > 0.1 * np.abs(wanted).max()
    assert difference(own_logits(experiment, params), wanted) < LOGITS
    out = tmp_path / "out"
    family = export_folder(experiment, params, str(out), say=lambda line: None)
    assert family == theirs.config.model_type
    again = type(theirs).from_pretrained(out)
    assert difference(their_logits(again, experiment.config.model), wanted) < 1e-6
    first = [getattr(m.config, "logit_scale_init_value", 0.0) for m in (again, theirs)]
    assert first[0] == pytest.approx(first[1])
    files = [safetensors_of(path) for path in (folder, out)]
    assert files[0].keys() == files[1].keys()
    for key, x in files[0].items():
        np.testing.assert_array_equal(x, files[1][key], err_msg=key)


def safetensors_of(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_an_import_has_the_objective_of_its_model(imported):
    for name, objective in (("clip", "contrastive"), ("vit_classes", "image_classification")):
        _, _, experiment, _ = imported(name)
        assert experiment.config_dict.objective.name == objective
        assert experiment.objective.layout.image_size == SIZE
    assert imported("clip")[2].config.model.max_logit_scale == 100  # of the paper
    _, _, experiment, _ = imported("siglip")
    own = experiment.config.objective
    assert (own.loss, own.begins_with_bos) == ("sigmoid", False)
    assert experiment.config.model.text.pad_id == experiment.tokenizer.pad_id == 256


def test_names_of_classes_come_and_go(imported, tmp_path, devices):
    theirs = make("vit_classes")
    theirs.config.id2label = {i: f"kind {i}" for i in range(7)}
    theirs.save_pretrained(tmp_path / "theirs")
    experiment, params = bring(tmp_path / "theirs", tmp_path / "run", devices[0])
    assert experiment.config.objective.labels == tuple(f"kind {i}" for i in range(7))
    export_folder(experiment, params, str(tmp_path / "out"), say=lambda line: None)
    tree = json.loads((tmp_path / "out" / "config.json").read_text())
    assert tree["id2label"] == {str(i): f"kind {i}" for i in range(7)}
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_preprocessing_comes_and_goes(imported, tmp_path, devices):
    theirs, _, _, _ = imported("clip")
    theirs.save_pretrained(tmp_path / "theirs")
    given = {
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 0.00392156862745098,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    file = tmp_path / "theirs" / "preprocessor_config.json"
    file.write_text(json.dumps(given))
    experiment, params = bring(tmp_path / "theirs", tmp_path / "run", devices[0])
    model = experiment.config.model
    assert (model.image_mean, model.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    export_folder(experiment, params, str(tmp_path / "out"), say=lambda line: None)
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert {key: written[key] for key in given} == given
    assert written["image_processor_type"] == "CLIPImageProcessor"
    file.write_text(json.dumps(given | {"crop_size": 15}))
    with pytest.raises(ValueError, match=r"has pictures of 15, and config.json of 16"):
        bring(tmp_path / "theirs", tmp_path / "other", devices[0])


def test_a_scale_beyond_the_limit_is_kept_at_import_and_cut_at_export(tmp_path, devices):
    theirs, notes = make("clip"), []
    with torch.no_grad():
        theirs.logit_scale.fill_(5.0)
    theirs.save_pretrained(tmp_path / "theirs")
    source = tmp_path / "theirs"
    experiment, params = bring(source, tmp_path / "run", devices[0], say=notes.append)
    assert experiment.config.model.max_logit_scale is None
    assert any("max_logit_scale: None, as the stored scale is 148.41" in line for line in notes)
    limited = experiment.variant({"model.max_logit_scale": 100.0})
    export_folder(limited, params, str(tmp_path / "out"), say=lambda line: None)
    written = safetensors_of(tmp_path / "out")["logit_scale"]
    assert written.shape == () and np.exp(written) == pytest.approx(100, rel=1e-6)


def test_a_model_that_they_do_not_have_is_refused(imported):
    _, _, experiment, _ = imported("clip")
    family = structure.family("clip")
    for changes, message in (
        ({"model.vision.pooling": "mean"}, "config.model.vision.pooling = 'mean'"),
        ({"model.has_logit_bias": True}, "config.model.has_logit_bias = True"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            structure.hf_config(family, experiment.variant(changes).config_dict.model)


# ---- published files ----

_BLOCKS = {"attention_dropout": 0.0, "initializer_factor": 1.0, "initializer_range": 0.02}


def _clip(width, layers, heads, mlp, patch, text, projection, act="quick_gelu", size=224, **more):
    """A config.json of OpenAI or LAION. text: its width, layers, heads and MLP."""
    shared = {**_BLOCKS, "hidden_act": act, "layer_norm_eps": 1e-05, "dropout": 0.0}
    words = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": projection,
        "text_config": {
            **shared,
            **dict(zip(words, text, strict=True)),
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "max_position_embeddings": 77,
            "model_type": "clip_text_model",
            "projection_dim": projection,
            "vocab_size": 49408,
            "top_k": 50,
            "torchscript": False,
            "tie_word_embeddings": None,
        },
        "torch_dtype": "float32",
        "transformers_version": None,
        "vision_config": {
            **shared,
            **dict(zip(words, (width, layers, heads, mlp), strict=True)),
            "image_size": size,
            "model_type": "clip_vision_model",
            "num_channels": 3,
            "patch_size": patch,
            "projection_dim": projection,
        },
        **more,
    }


def _siglip(width, layers, heads, mlp, patch, size, vocabulary, length=64, **text):
    words = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = dict(zip(words, (width, layers, heads, mlp), strict=True))
    return {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {
            "model_type": "siglip_text_model",
            **sizes,
            "vocab_size": vocabulary,
            "max_position_embeddings": length,
            **text,
        },
        "torch_dtype": "float32",
        "transformers_version": "4.37.0.dev0",
        "vision_config": {
            "model_type": "siglip_vision_model",
            **sizes,
            "image_size": size,
            "patch_size": patch,
        },
    }


_VIT = {
    "architectures": ["ViTModel"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 768,
    "image_size": 224,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "model_type": "vit",
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 16,
    "qkv_bias": True,
    "transformers_version": "4.13.0.dev0",
}
_H14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
# the keys of the published files that say something
PUBLISHED = {
    "openai/clip-vit-base-patch32": _clip(768, 12, 12, 3072, 32, (512, 12, 8, 2048), 512),
    "openai/clip-vit-large-patch14": _clip(1024, 24, 16, 4096, 14, (768, 12, 12, 3072), 768),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _clip(
        *(1280, 32, 16, 5120, 14, (1024, 24, 16, 4096), 1024, "gelu"),
        text_config_dict={"hidden_act": "gelu", "num_hidden_layers": 24, **_H14},
        vision_config_dict={
            **{"hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120},
            **{"num_attention_heads": 16, "num_hidden_layers": 32, "patch_size": 14},
        },
    ),
    "google/siglip-base-patch16-224": _siglip(768, 12, 12, 3072, 16, 224, 32_000),
    "google/siglip-so400m-patch14-384": _siglip(1152, 27, 16, 4304, 14, 384, 32_000),
    "google/siglip2-base-patch16-224": _siglip(
        768, 12, 12, 3072, 16, 224, 256_000, projection_size=768
    ),
    "google/vit-base-patch16-224-in21k": _VIT,
    "google/vit-base-patch16-224": {
        **_VIT,
        "architectures": ["ViTForImageClassification"],
        "id2label": {str(i): f"class {i}" for i in range(1000)},
    },
}
# what is known of the checkpoints' parameters
COUNTS = {
    "openai/clip-vit-base-patch32": 151_277_313,
    "openai/clip-vit-large-patch14": 427_616_513,
    "google/vit-base-patch16-224": 86_567_656,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_json_gives_the_parameters_of_the_checkpoint(name):
    tree = PUBLISHED[name]
    [architecture] = tree["architectures"]
    tensors = ("vit.pooler.dense.weight",) if architecture == "ViTModel" else ()
    section = structure.model_section(tree, tensors)
    found = flops.parameters(structure.resolve(section)).total
    config = transformers.AutoConfig.for_model(**copy.deepcopy(tree))
    with torch.device("meta"):
        theirs = getattr(transformers, architecture)(config)
    assert found == sum(x.numel() for x in theirs.parameters())
    assert found == COUNTS.get(name, found)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("openai/clip-vit-base-patch32", {"vision_config.num_channels": 4}, "num_channels = 4"),
        (
            "openai/clip-vit-base-patch32",
            {"text_config.hidden_act": "mish"},
            "config.json, text_config, has hidden_act = 'mish'",
        ),
        (
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            {"text_config_dict.num_hidden_layers": 12},
            "num_hidden_layers = 24 in text_config, and 12 in text_config_dict",
        ),
        (
            "google/siglip-base-patch16-224",
            {"vision_config.vision_use_head": False},
            "vision_use_head = False",
        ),
        ("google/siglip-base-patch16-224", {"model_type": "siglip2"}, "no family 'siglip2'"),
        ("google/vit-base-patch16-224", {"qkv_bias": False}, "qkv_bias = False"),
        ("google/vit-base-patch16-224", {"patch_size": [16, 8]}, "patch_size = [16, 8]"),
        ("google/vit-base-patch16-224", {"mask_ratio": 0.5}, "mask_ratio = 0.5"),
    ],
)
def test_what_can_not_be_represented_is_named(name, changes, message):
    tree = copy.deepcopy(PUBLISHED[name])
    for path, value in changes.items():
        section, _, key = path.rpartition(".")
        (tree[section] if section else tree)[key] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        structure.model_section(tree)
