"""At the base a parametrization changes no bit; elsewhere it does what its table says."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from environment import some

from lm.config.schema import OptimizerConfig, ScheduleConfig
from lm.hf import folding
from lm.layers.lora import LoraConfig
from lm.layers.moe.moe import MoeConfig
from lm.models import decoder, encoder, encoder_decoder
from lm.optim import chain, param_tree
from lm.optim.parametrization import TABLES, Scaling
from tests.conftest import TINY
from tests.parameters import random_params

BASE = {"base_embed_dim": 16, "base_num_layers": 2, "base_head_dim": 4}
WIDE = {"base_embed_dim": 4, "base_num_layers": 1, "base_head_dim": 1}  # of TINY: 4, 2 and 4 times
MUP = {"parametrization": "mup"}


def paths(**model):
    return {f"model.{name}": value for name, value in model.items()}


# ---- the base ----


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.name": "adamw", "model.tie_embeddings": False},
        pytest.param(
            {"optimizer.name": "lion", "model.init_std": None, "model.positions": "learned"},
            marks=pytest.mark.slow,
        ),
        {"optimizer.name": "muon", "model.activation": "swiglu", "model.moe.num_experts": 4},
    ],
    ids=lambda c: c["optimizer.name"],
)
def test_mup_at_the_base_is_the_standard_program(changes, make_experiment):
    standard = make_experiment(changes)
    mup = make_experiment({**changes, **paths(**MUP, **BASE)})
    texts = [e.lower_train_step().as_text() for e in (standard, mup)]
    assert texts[0] == texts[1]


def test_mup_at_the_base_has_the_bits_of_the_standard_run(make_experiment):
    found = []
    for changes in ({}, paths(**MUP, **BASE)):
        experiment = make_experiment(changes)
        state = experiment.init_state()
        for _, batch in experiment.batches(0, 3):
            state, sums, _ = experiment.train_step(state, batch)
        found.append(jax.device_get((state, dict(sums))))
    a, b = (jax.tree_util.tree_leaves_with_path(x) for x in found)
    assert len(a) == len(b) == 39
    for (path, x), (_, y) in zip(a, b, strict=True):
        assert x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


def test_one_table_of_vectors_can_be_embedding_and_head():
    for table in TABLES.values():
        assert table.rows["embedding"] == table.rows["head"]


# ---- other sizes ----


def boxed(config, rules_on):
    model = decoder.build(config, rules_on())
    tokens = jnp.zeros((1, 4), jnp.int32)
    tokens = decoder.Tokens(tokens, tokens, tokens)
    return model, jax.eval_shape(
        lambda: model.init(jax.random.key(0), tokens, method=lambda m, x: m.logits(m(x).hidden))[
            "params"
        ]
    )


# Width 4 times and depth twice the base, by hand from Table 8 of arXiv:2203.03466 and Table 1 of
# arXiv:2505.01618: (initial deviation, learning rate, epsilon).
EXPECTED = {
    "embedding.weight": (1, 1, 1 / 4),
    "head.weight": (1, 1, 1 / 4),
    "norm.scale": (None, 1, 1 / 4),
    "layers.attention.query.weight": (1 / 2, 1 / 4, 1 / 8),
    "layers.attention.out.weight": (2**0.5 / 2, 1 / 4, 1 / 8),  # for 1 layer, not 2
    "layers.attention_norm.scale": (None, 1, 1 / 8),
    "layers.moe.router": (1 / 4, 1 / 4, 1 / 8),
    "layers.moe.up": (1 / 2, 1 / 4, 1 / 8),
}
MUON = {"layers.attention.query.weight": 1 / 2, "layers.moe.router": 1 / 4, "head.weight": 1}


def test_factors_follow_the_published_tables(rules_on):
    config = decoder.Config(
        **{**TINY, **MUP, **WIDE, "tie_embeddings": False},
        moe=MoeConfig(num_experts=4),
    )
    config.check(32)
    _, params = boxed(config, rules_on)
    every = ("matrix", "embedding", "vector")
    for name, rates in (("adamw", {}), ("lion", {}), ("muon", MUON)):
        optimizer = OptimizerConfig(name=name, decay_roles=every)
        factors = param_tree.flatten(chain.make_factors(optimizer, params, config.scaling))
        for path, (_, rate, epsilon) in EXPECTED.items():
            found = factors[path]
            wanted = (rates.get(path, rate) if name == "muon" else rate, epsilon)
            if name != "muon" or path in MUON:
                assert (found.rate, found.epsilon, found.decays) == (*wanted, True), (name, path)
    assert (config.scaling.logits, config.scaling.branch) == (1 / 4, 1 / 2)


@pytest.mark.parametrize("init_std", [0.02, None])
def test_initial_weights_follow_the_table(init_std, rules_on):
    """Each deviation against that of the standard parametrization at the width of the base, where
    fan_in is a quarter.
    """
    shapes = {"tie_embeddings": False, "vocab_size": 4096, "embed_dim": 64, "mlp_dim": 256}
    base = {"base_embed_dim": 16, "base_num_layers": 1, "base_head_dim": 16}
    config = decoder.Config(**{**TINY, **shapes, **MUP, **base, "init_std": init_std})
    model, _ = boxed(config, rules_on)
    tokens = decoder.Tokens(*[jnp.zeros((1, 4), jnp.int32)] * 3)
    init = lambda m, x: m.logits(m(x).hidden)  # noqa: E731
    made = jax.jit(functools.partial(model.init, method=init))(jax.random.key(0), tokens)
    params = nn.meta.unbox(made["params"])
    found = param_tree.flatten(params)
    std = 0.02 if init_std is None else init_std
    of_base = {  # deviations at the base
        "embedding.weight": (std, 1),
        "head.weight": (init_std or 16**-0.5, 1),
        "layers.attention.query.weight": (init_std or 16**-0.5, 1 / 2),
        "layers.attention.out.weight": ((init_std or 16**-0.5) * 2**-0.5, 1 / 2),
        "layers.mlp.down.weight": ((init_std or 64**-0.5) * 2**-0.5, 1 / 2),
    }
    for name, (deviation, factor) in of_base.items():
        assert np.std(found[name]) == pytest.approx(deviation * factor, rel=0.04), name


def test_steps_and_decay_have_their_factors():
    """Without epsilon, an update is the standard one times the rate, and decay is the same."""
    axes = {"up": ("layers", "embed", "mlp"), "embedding": ("vocab", "embed")}
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=(2, 6, 8)[-len(a) :]).astype(np.float32) for n, a in axes.items()}
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    tree = {
        n: nn.Partitioned(jax.ShapeDtypeStruct(params[n].shape, "float32"), axes[n]) for n in axes
    }
    every = OptimizerConfig(
        eps=1e-30,
        learning_rate=0.5,
        weight_decay=0.3,
        decay_roles=("matrix", "embedding"),
        schedule=ScheduleConfig(kind="constant"),
    )

    def update(scaling, **changes):
        tx = chain.make_optimizer(dataclasses.replace(every, **changes), tree, 10, scaling)
        return tx.update(grads, tx.init(params), params)[0]

    at = Scaling("mup", width=4.0, depth=3.0)
    wide, standard, bare = update(at), update(Scaling()), update(Scaling(), weight_decay=0.0)
    for name, factor in (("up", 1 / 4), ("embedding", 1)):
        decay = standard[name] - bare[name]
        np.testing.assert_allclose(wide[name], factor * bare[name] + decay, rtol=1e-5)
    np.testing.assert_allclose(
        standard["up"] - bare["up"], -0.15 * params["up"], rtol=2e-4, atol=1e-6
    )


def test_epsilon_shrinks_as_gradients_do():
    tree = {"up": nn.Partitioned(jax.ShapeDtypeStruct((4, 4), jnp.float32), ("embed", "mlp"))}
    params = {"up": np.zeros((4, 4), np.float32)}
    config = OptimizerConfig(eps=0.1, schedule=ScheduleConfig(kind="constant"), clip_norm=0.0)

    def update(scaling, gradient):
        tx = chain.make_optimizer(config, tree, 10, scaling)
        grads = {"up": np.full((4, 4), gradient, np.float32)}
        return tx.update(grads, tx.init(params), params)[0]["up"][0, 0].item()

    at_base, wide = update(Scaling(), 0.2), update(Scaling("mup", width=8.0), 0.2 / 8)
    assert wide * 8 == pytest.approx(at_base, rel=1e-6)
    assert at_base == pytest.approx(-3e-4 * 0.2 / 0.3, rel=1e-5)


def test_scores_are_divided_by_the_width_of_a_head():
    config = decoder.Config(**{**TINY, **MUP, **BASE, "head_dim": 64})
    assert config.score_scale == pytest.approx(4**0.5 / 64)
    assert config.scaling.scores == (64 / 4) ** -0.5


# ---- export ----

FOLDED = {
    "tied": (decoder, {"qkv_bias": True, "mlp_bias": True, "out_bias": True}),
    "untied": (decoder, {"tie_embeddings": False, "qk_norm": True}),
    "gemma": (decoder, {"norm": "rms_plus_one", "norm_placement": "both", "qk_norm": True}),
    "encoder": (encoder, {"norm": "layer", "norm_bias": True}),
    "encoder_decoder": (encoder_decoder, {"qk_norm": False}),
}


@pytest.mark.parametrize("case", some(FOLDED, "gemma", "encoder_decoder"))
def test_folded_weights_compute_the_same(case, rules_on, pack):
    module, changes = FOLDED[case]
    changes = {**TINY, "embed_dim": 16, **changes, **MUP, **WIDE, "vocab_size": 40}
    config = module.Config(**changes)
    config.check(16)
    model = module.build(config, rules_on())
    tokens = jax.tree.map(jnp.asarray, pack([[10, 6]], length=16, vocab_size=40))
    memory = tokens if config.takes_encoder else None

    def logits(model, tokens):
        return model.logits(model(tokens, encoder=memory).hidden)

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), tokens, method=logits)["params"])
    params = random_params(shapes)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}

    class Section(dict):
        def copy_and_resolve_references(self):
            return Section(self)

        def __setattr__(self, name, value):
            self[name] = value

    section, leaves = folding.fold(Section(fields), config, param_tree.flatten(params))
    assert section["parametrization"] == "standard"
    plain = module.build(module.Config(**section), rules_on())
    folded = param_tree.unflatten(leaves)
    wanted, found, other = (
        jax.jit(functools.partial(m.apply, method=logits))({"params": p}, tokens)
        for m, p in ((model, params), (plain, folded), (plain, params))
    )
    size = np.max(np.abs(wanted))
    np.testing.assert_allclose(found, wanted, atol=2e-5 * size)
    assert np.max(np.abs(other - wanted)) > 0.1 * size


def test_a_factor_without_weights_to_go_into_is_refused():
    config = decoder.Config(
        **{**TINY, **MUP, "norm_placement": "post"},
        base_embed_dim=8,
        base_num_layers=2,
        base_head_dim=4,
    )
    config.check(32)
    with pytest.raises(ValueError, match=r"config\.model\.parametrization \(mup\).*logits"):
        folding.fold(None, config, {"embedding.weight": np.ones((2, 2))})


# ---- refusals ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parametrization": "ntk"}, r"parametrization \('ntk'\) must be one of standard, mup"),
        ({**MUP, "base_embed_dim": 8, "base_num_layers": 2}, r"base_head_dim must be given"),
        ({**MUP, **BASE, "base_embed_dim": 0}, r"base_embed_dim \(0\) must be at least 1"),
        ({**MUP, **WIDE, "query_scale": 0.3}, r"query_scale \(0.3\) .*head_dim \(4\).*\(1\)"),
        ({**MUP, **WIDE, "norm_placement": "post"}, r"num_layers \(2\) must be .*\(1\)"),
        ({**MUP, **BASE, "lora": LoraConfig(rank=2)}, r"lora\.rank \(2\)"),
    ],
)
def test_models_that_the_table_does_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=rf"config\.model\.{message}"):
        decoder.Config(**{**TINY, **changes}).check(32)


def test_an_encoder_of_its_own_depth_is_refused():
    config = encoder_decoder.Config(**{**TINY, **MUP, **BASE}, num_encoder_layers=3)
    with pytest.raises(ValueError, match=r"num_encoder_layers \(3\) must be .*num_layers \(2\)"):
        config.check(32)


@pytest.mark.parametrize("name", ["adafactor", "sgd"])
def test_steps_without_a_row_are_refused(name):
    with pytest.raises(ValueError, match=rf"config\.optimizer\.name \({name}\).*\(mup\)"):
        chain.check(OptimizerConfig(name=name), Scaling("mup"))
    assert isinstance(
        chain.make_optimizer(OptimizerConfig(name=name), {}, 10), optax.GradientTransformation
    )


def test_recurrent_models_have_no_such_key(make_config):
    from lm.config import conversion

    config = conversion.default(model="lstm")
    with pytest.raises(ValueError, match=r"config\.model\.parametrization is not a config key"):
        conversion.resolve({**config.to_dict(), "model": {**config.model.to_dict(), **MUP}})
