import dataclasses
import importlib
import json
import math
import pkgutil
import typing

import ml_collections
import pytest

from lm.config import conversion
from lm.config import schema as configs
from lm.config.components import COMPONENTS, EVALUATIONS, component, components_in
from lm.config.conversion import assign as set_from_text
from lm.config.conversion import changed, default, explain, from_json, resolve, task, to_json
from lm.config.fields import check_value, field
from lm.config.schema import ScheduleConfig
from lm.config.tree import to_tree


def leaves(tree, prefix="config"):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}.{key}")
        else:
            yield f"{prefix}.{key}", value


def assign(config, path, value):
    *sections, key = path.split(".")[1:]
    for section in sections:
        config = config[section]
    config[key] = value


@pytest.fixture
def component_outside(tmp_path, monkeypatch):
    """A model component in a package of its own."""
    (tmp_path / "their_models").mkdir()
    (tmp_path / "their_models" / "bigram.py").write_text(
        "import dataclasses\n"
        "from lm.config.fields import field\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Config:\n"
        "    vocab_size: int = field(64, 'Rows of the table.')\n"
        "    smoothing: float | None = field(None, 'Added to counts.')\n"
        "def build(config, rules):\n"
        "    return config\n"
    )
    (tmp_path / "their_models" / "empty.py").write_text("import dataclasses\n")
    (tmp_path / "their_models" / "broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "their_models.bigram"


def test_defaults_resolve_to_the_defaults_of_the_dataclasses():
    config = resolve(default())
    assert config.optimizer == configs.OptimizerConfig()
    assert config.data == configs.DataConfig()
    assert config.model == component("lm.models", "decoder").Config()
    assert config == resolve({"model": {"name": "decoder"}, "objective": {"name": "causal"}})


def test_assigned_values_reach_the_frozen_config():
    config = default()
    config.model.num_layers = 3
    config.model.rotary.theta = 500_000
    config.optimizer.schedule.kind = "wsd"
    config.data.train = ("a", "b")
    frozen = resolve(config)
    assert frozen.model.num_layers == 3
    assert frozen.model.rotary.theta == 500_000.0 and isinstance(frozen.model.rotary.theta, float)
    assert frozen.optimizer.schedule.kind == "wsd"
    assert frozen.data.train == ("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.seed = 1


def test_a_sharding_rule_may_name_no_axis_or_several():
    config = default()
    config.mesh.rules = (("embed", None), ("mlp", ("tensor", "fsdp")), ("heads", "tensor"))
    assert resolve(config).mesh.rules == config.mesh.rules
    assert resolve(from_json(to_json(config))).mesh.rules == config.mesh.rules


def test_a_resolved_config_can_be_a_static_argument():
    config = default()
    config.data.train = ["a"]  # a list becomes a tuple, else it has no hash
    assert hash(resolve(config)) == hash(resolve(config))


def test_fields_without_a_default_value_can_be_set_and_stay_typed():
    config = default()
    for path, value in leaves(config.to_dict()):
        if value is None:
            with pytest.raises(TypeError):
                assign(config, path, "three")
            for good in (3, 3.0):
                try:
                    assign(config, path, good)
                    break
                except TypeError:
                    continue
            else:
                pytest.fail(f"{path} takes no number")
    frozen = resolve(config)
    assert frozen.train.num_tokens == 3 and frozen.model.query_scale == 3.0


@pytest.mark.parametrize(
    "path, value, expected",
    [
        ("config.modle", {}, "config.modle is not a config key; did you mean config.model?"),
        (
            "config.lr",
            1.0,
            "config.lr is not a config key; did you mean config.optimizer.learning_",
        ),
        (
            "config.optimizer.lr",
            1.0,
            "config.optimizer.lr is not a config key; did you mean config",
        ),
        (
            "config.batch_size",
            8,
            "config.batch_size is not a config key; did you mean config.data.",
        ),
        ("config.model.num_layer", 3, "did you mean config.model.num_layers?"),
        ("config.model.rotary.tehta", 3.0, "did you mean config.model.rotary.theta?"),
        ("config.optimizer.schedule.name", "wsd", "did you mean config.optimizer.schedule.kind?"),
        ("config.optimizer.kind", "adamw", "did you mean config.optimizer.name?"),
        ("config.optimizer.schedule.warm_up_steps", 3, "config.optimizer.schedule.warmup_steps?"),
        ("config.objective.mask_rate", 0.15, "config.objective.mask_rate is not a config key"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_closest_one(path, value, expected):
    config = default().to_dict()
    assign(config, path, value)
    with pytest.raises(ValueError) as error:
        resolve(config)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "path, value, expected",
    [
        ("config.seed", "one", "config.seed must be int, got 'one'"),
        ("config.model.num_layers", 2.5, "config.model.num_layers must be int, got 2.5"),
        ("config.model.num_layers", None, "config.model.num_layers must be int, got None"),
        ("config.model.num_layers", True, "config.model.num_layers must be int, got True"),
        ("config.model.tie_embeddings", 1, "config.model.tie_embeddings must be bool, got 1"),
        ("config.model.window", "all", "config.model.window must be int, got 'all'"),
        ("config.optimizer.learning_rate", True, "config.optimizer.learning_rate must be float"),
        ("config.optimizer.schedule.kind", 3, "config.optimizer.schedule.kind must be str, got 3"),
        ("config.optimizer.schedule", 3, "config.optimizer.schedule must be a section"),
        ("config.data.train", "store", "config.data.train must be"),
        ("config.data.train", ("store", 3), "config.data.train[1] must be str, got 3"),
        ("config.model.name", None, "config.model.name must name a component of lm.models"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_path(path, value, expected):
    config = default().to_dict()
    assign(config, path, value)
    with pytest.raises(ValueError) as error:
        resolve(config)
    assert expected in str(error.value)


def component_names():
    for key, package in COMPONENTS.items():
        home = importlib.import_module(package)
        for module in pkgutil.iter_modules(home.__path__):
            if hasattr(importlib.import_module(f"{package}.{module.name}"), "Config"):
                yield key, module.name


def fields_below(config, path):
    """(path, field, value) of every field of a frozen config and of those in it."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from fields_below(value, f"{path}.{f.name}")
        else:
            hint = typing.get_type_hints(type(config))[f.name]
            yield f"{path}.{f.name}", f, value, hint


def every_field():
    sections = resolve(default())
    for f in dataclasses.fields(sections):
        if f.name == "seed":
            yield "config.seed", f, sections.seed, int
        elif f.name not in (*COMPONENTS, "evaluations"):
            yield from fields_below(getattr(sections, f.name), f"config.{f.name}")
    for key, name in component_names():
        yield from fields_below(component(COMPONENTS[key], name).Config(), f"{key} {name}")
    for name in components_in(EVALUATIONS):
        yield from fields_below(component(EVALUATIONS, name).Config(), f"evaluation {name}")


def numeric(hint):
    args = typing.get_args(hint)
    return any(map(numeric, args)) if args else hint in (int, float)


def test_every_numeric_field_states_a_range_that_holds_its_default():
    seen = 0
    for path, f, value, hint in every_field():
        if numeric(hint):
            assert "range" in f.metadata, f"{path} states no range beside its default"
            check_value(value, f.metadata, path)
            seen += 1
    assert seen > 150


def test_every_text_of_a_field_with_choices_is_one_of_them():
    chosen = [(path, f, value) for path, f, value, _ in every_field() if f.metadata["choices"]]
    assert {"config.loader.kind", "config.guard.policy"} <= {path for path, *_ in chosen}
    for path, f, value in chosen:
        check_value(value, f.metadata, path)


@pytest.mark.parametrize(
    "path, value, expected",
    [
        ("config.seed", -1, "config.seed (-1) must be in [0, 4294967296)"),
        ("config.train.log_every", 0, "config.train.log_every (0) must be at least 1"),
        ("config.train.num_tokens", 0, "config.train.num_tokens (0) must be at least 1"),
        ("config.train.num_epochs", math.nan, "config.train.num_epochs (nan) must be above 0"),
        ("config.checkpoint.keep_every", -1, "config.checkpoint.keep_every (-1) must be at least"),
        ("config.checkpoint.keep_last", 0, "config.checkpoint.keep_last (0) must be at least 1"),
        ("config.checkpoint.at", (5, -3), "config.checkpoint.at[1] (-3) must be at least 0"),
        ("config.optimizer.b1", 1, "config.optimizer.b1 (1.0) must be in [0, 1)"),
        ("config.optimizer.eps", 0.0, "config.optimizer.eps (0.0) must be above 0"),
        (
            "config.optimizer.learning_rate",
            math.nan,
            "config.optimizer.learning_rate (nan) must be",
        ),
        (
            "config.optimizer.learning_rate",
            math.inf,
            "config.optimizer.learning_rate (inf) must be",
        ),
        ("config.optimizer.ema_decay", 1.5, "config.optimizer.ema_decay (1.5) must be in [0, 1)"),
        (
            "config.optimizer.schedule.warmup_steps",
            -3,
            "config.optimizer.schedule.warmup_steps (-3) must be at least 0",
        ),
        ("config.loss.label_smoothing", 1.5, "config.loss.label_smoothing (1.5) must be in [0, 1)"),
        ("config.loss.z_loss", -1, "config.loss.z_loss (-1.0) must be at least 0"),
        ("config.loss.chunk_size", -5, "config.loss.chunk_size (-5) must be at least 0"),
        ("config.mesh.fsdp", 0, "config.mesh.fsdp (0) must be at least 1, or -1"),
        ("config.mesh.zero", 2, "config.mesh.zero (2) must be 3, or 1"),
        ("config.guard.spike_factor", 0.5, "config.guard.spike_factor (0.5) must be above 1, or 0"),
        ("config.model.rotary.theta", 0.0, "config.model.rotary.theta (0.0) must be above 0"),
        ("config.model.num_layers", 0, "config.model.num_layers (0) must be at least 1"),
        ("config.data.weights", (1.0, -2.0), "config.data.weights[1] (-2.0) must be above 0"),
        ("config.loader.kind", "tf", "config.loader.kind ('tf') must be one of tf.data, thread"),
        (
            "config.guard.policy",
            "skipp",
            "config.guard.policy ('skipp') must be one of stop, skip,",
        ),
        (
            "config.data.packing",
            "bestfit",
            "must be one of split, best_fit; did you mean best_fit?",
        ),
    ],
)
def test_a_value_out_of_its_range_is_refused_with_path_value_and_range(path, value, expected):
    config = default().to_dict()
    assign(config, path, value)
    with pytest.raises(ValueError) as error:
        resolve(config)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_values_of_tasks_are_held_to_the_ranges_of_their_objective():
    config = default(objective="multitask")
    config.objective.tasks = {"a": task("mlm", ("x",), rate=2.0)}
    with pytest.raises(ValueError, match=r"config\.objective\.tasks\.a\.rate \(2\.0\) must be in"):
        resolve(config)


def test_tasks_that_are_no_section_are_refused():
    tree = default(objective="multitask").to_dict()
    tree["objective"]["tasks"] = 3
    with pytest.raises(ValueError, match=r"config\.objective\.tasks must be dict, got 3"):
        resolve(tree)


def test_a_number_of_a_component_without_a_range_must_be_finite(component_outside):
    config = default(model=component_outside)
    config.model.smoothing = math.nan
    with pytest.raises(ValueError, match=r"config\.model\.smoothing \(nan\) must be finite"):
        resolve(config)


def test_integers_may_be_written_as_1e9():
    config = default()
    config.train.num_tokens = 1e9
    config.data.batch_size = 1e2
    set_from_text(config, "model.vocab_size=3.2e4")
    set_from_text(config, "checkpoint.at=(1e3, 2e3)")
    resolved = resolve(config)
    assert (resolved.train.num_tokens, resolved.data.batch_size) == (10**9, 100)
    assert (resolved.model.vocab_size, resolved.checkpoint.at) == (32_000, (1000, 2000))
    assert isinstance(config.train.num_tokens, int) and isinstance(config.model.vocab_size, int)
    tree = json.loads(to_json(config))
    tree["train"]["num_tokens"] = 2.5e9
    assert resolve(from_json(json.dumps(tree))).train.num_tokens == 2_500_000_000
    with pytest.raises(ValueError, match=r"config\.model\.num_layers must be int, got '1\.5'"):
        set_from_text(config, "model.num_layers=1.5")


def test_a_section_that_is_a_default_keeps_its_values():
    @dataclasses.dataclass(frozen=True)
    class Outer:
        schedule: ScheduleConfig = field(ScheduleConfig(kind="wsd", warmup_steps=7), "A schedule.")

    assert Outer().schedule == ScheduleConfig(kind="wsd", warmup_steps=7)
    tree = to_tree(Outer())
    assert (tree.schedule.kind, tree.schedule.warmup_steps) == ("wsd", 7)
    partly = conversion._from_dict(Outer(), {"schedule": {"warmup_steps": 9}}, "config.outer")
    assert partly.schedule == ScheduleConfig(kind="wsd", warmup_steps=9)


def test_a_whole_number_may_stand_for_a_float():
    config = default().to_dict()
    config["optimizer"]["clip_norm"] = 1
    assert isinstance(resolve(config).optimizer.clip_norm, float)


def test_json_gives_back_the_same_config():
    config = default()
    config.seed = 7
    config.model.window = 16
    config.model.layer_pattern = ("local", "global")
    config.model.init_std = None
    config.train.num_tokens = 10**12
    again = from_json(to_json(config))
    assert resolve(again) == resolve(config)
    assert not changed(config, again)
    assert to_json(again) == to_json(config)


def test_a_config_read_from_json_can_be_changed_like_a_new_one():
    config = from_json(to_json(default()))
    config.train.num_tokens = 5  # unset in the file: null
    config.data.train = ("store",)
    assert resolve(config).train.num_tokens == 5
    with pytest.raises(TypeError):
        config.model.num_layers = "three"


def test_an_older_file_without_a_field_gets_its_default():
    tree = json.loads(to_json(default()))
    del tree["optimizer"]["ema_decay"], tree["model"]["rotary"]["factor"], tree["log"]
    assert resolve(from_json(json.dumps(tree))) == resolve(default())


def test_a_file_with_a_field_that_is_gone_is_refused_by_path():
    tree = json.loads(to_json(default()))
    tree["optimizer"]["schedule"]["restart"] = 3
    with pytest.raises(ValueError, match=r"config\.optimizer\.schedule\.restart"):
        from_json(json.dumps(tree))
    del tree["optimizer"]["schedule"]["restart"]
    tree["optimizer"]["lookahead"] = {"steps": 5}
    with pytest.raises(ValueError, match=r"config\.optimizer\.lookahead is not a config key"):
        from_json(json.dumps(tree))


def test_changed_lists_the_paths_that_differ_with_both_values():
    old, new = default(), default()
    new.model.num_layers = 2
    new.optimizer.schedule.kind = "wsd"
    new.data.train = ["a"]
    assert changed(old, old) == {}
    assert changed(old, new) == {
        "model.num_layers": (12, 2),
        "optimizer.schedule.kind": ("cosine", "wsd"),
        "data.train": ((), ("a",)),
    }


def test_changed_sees_no_difference_between_lists_and_tuples():
    old, new = default(), default()
    old.mesh.rules = (("mlp", ("tensor", "fsdp")),)
    new.mesh.rules = [["mlp", ["tensor", "fsdp"]]]
    assert changed(old, new) == {}


def test_explain_has_a_sentence_for_every_key():
    config = default()
    rows = list(explain(config))
    assert {f"config.{path}" for path, *_ in rows} == {path for path, _ in leaves(config.to_dict())}
    for path, _, _, sentence in rows:
        assert sentence.endswith(".") and sentence[0] != " ", f"{path}: {sentence!r}"
    sentences = {path: sentence for path, _, _, sentence in rows}
    assert sentences["optimizer.b2"] == "Decay of the second moment. Must be in [0, 1)."
    assert sentences["mesh.fsdp"].endswith("Must be at least 1, or -1.")


def test_explain_tells_values_from_defaults():
    config = default()
    config.model.num_layers = 2
    rows = {path: (value, base) for path, value, base, _ in explain(config)}
    assert rows["model.num_layers"] == (2, 12)
    assert rows["model.num_heads"] == (12, 12)


def test_an_unknown_component_is_refused_with_those_that_exist():
    names = (
        "clip, conv, decoder, encoder, encoder_decoder, lstm, seqgan, vae, vit, vqvae; "
        "did you mean decoder"
    )
    message = rf"config\.model\.name \('decodre'\) is not in lm\.models; there are: {names}\?"
    with pytest.raises(ValueError, match=message):
        component("lm.models", "decodre")
    message = r"config\.objective\.name \('x'\) is not in lm\.objectives; there are: .*causal"
    with pytest.raises(ValueError, match=message):
        default(objective="x")


def test_a_component_may_live_in_another_package(component_outside):
    config = default(model=component_outside)
    assert config.model.name == component_outside and config.model.vocab_size == 64
    config.model.smoothing = 0.5
    assert resolve(config).model.smoothing == 0.5
    assert resolve(from_json(to_json(config))) == resolve(config)
    assert ("model.smoothing", 0.5, None, "Added to counts.") in list(explain(config))
    config.model.unlock()
    config.model.vocab = 3
    with pytest.raises(ValueError, match=r"did you mean config\.model\.vocab_size\?"):
        resolve(config)


def test_a_module_that_is_no_component_says_what_it_lacks(component_outside):
    with pytest.raises(ValueError, match=r"is no component: their_models\.empty has no `Config`"):
        component("lm.models", "their_models.empty")


def test_a_missing_dependency_of_a_component_is_not_reported_as_a_missing_component(
    component_outside,
):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        component("lm.models", "their_models.broken")


def test_a_component_that_is_nowhere_is_refused(component_outside):
    for name in ("their_models.trigram", "nowhere.bigram"):
        missing = "nowhere" if name == "nowhere.bigram" else name
        expected = f"{name}'\\): Python finds no module {missing}; .* PYTHONPATH=FOLDER"
        with pytest.raises(ValueError, match=expected):
            component("lm.models", name)


def test_sections_of_the_config_dict_are_those_of_the_dataclass():
    config = default()
    assert isinstance(config, ml_collections.ConfigDict)
    assert set(config) == {f.name for f in dataclasses.fields(configs.Config)}
