"""Generation: cached steps, sampling, where a text ends, and streams, with small models."""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from environment import fake_devices, run_script, some

from lm.checkpoint.manager import Checkpoints
from lm.config import conversion
from lm.config.schema import MeshConfig
from lm.generation.beam import BeamSearch
from lm.generation.decode import CHUNK
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling, choose
from lm.models import decoder
from lm.parallel.sharding import make_rules
from lm.telemetry.progress import format_quantity
from lm.tokenizers.tokenizer import ByteTokenizer
from lm.types import Tokens
from scripts import generate as generate_script

TOKENIZER = ByteTokenizer()
GREEDY = Sampling(temperature=0)
VARIANTS = {
    "local_global": {
        "num_layers": 3,
        "layer_pattern": ("local", "local", "global"),
        "window": 5,
        "num_kv_heads": 2,
    },
    "learned": {"positions": "learned", "norm": "layer", "activation": "swiglu"},
    "alibi": {"positions": "alibi", "tie_embeddings": False},
}
PROMPTS = [[1, 2, 3], [], list(range(50, 70)), list(range(200, 211))]


def forward(model, tokens):
    return model.logits(model(tokens).hidden)


@functools.cache
def model_and_params(mesh=(), **changes):
    """A tiny decoder, with more rows than the tokenizer has ids, and random parameters.

    mesh: pairs of axis and size; as many devices are used.
    """
    fields = {"vocab_size": 264, "max_length": 64, "num_layers": 2, "embed_dim": 32}
    config = decoder.Config(**{**fields, "num_heads": 4, **changes})
    devices = jax.devices()[: math.prod(size for _, size in mesh)]
    model = decoder.build(config, make_rules(MeshConfig(**{"data": 1, **dict(mesh)}), devices))
    zeros = jnp.zeros((model.rules.size("batch"), model.rules.size("length")), jnp.int32)
    init = functools.partial(model.init, method=forward)
    boxed = jax.eval_shape(init, jax.random.key(0), Tokens(zeros, zeros, zeros))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype), nn.unbox(boxed)
    )
    return model, jax.device_put(params, model.rules.shardings(boxed))["params"]


def make_generator(variant="local_global"):
    return Generator(*model_and_params(**VARIANTS[variant]), TOKENIZER)


@functools.partial(jax.jit, static_argnames="model")
def uncached_logits(model, params, ids, length):
    """float32 [V] after the first `length` of ids: [T], all computed anew and nothing cached."""
    places = jnp.arange(ids.shape[0])
    segments = (places < length).astype(jnp.int32)
    tokens = Tokens(ids[None], segments[None], places[None])
    return model.apply({"params": params}, tokens, method=forward)[0, length - 1]


def uncached_logprobs(model, params, ids):
    row = np.zeros(model.config.max_length, np.int32)
    row[: len(ids)] = ids
    return jax.nn.log_softmax(uncached_logits(model, params, row, len(ids)))


@pytest.mark.parametrize("variant", some(VARIANTS, "local_global"))
def test_cached_steps_of_a_padded_batch_equal_uncached_ones_of_each_prompt(variant):
    generator = make_generator(variant)
    for made in generator.generate(PROMPTS, max_new_tokens=24, sampling=GREEDY):
        ids = [TOKENIZER.bos_id, *PROMPTS[made.prompt]]
        assert len(made.ids) == 24 or made.finished == "eos"
        for token, logprob in zip(made.ids, made.logprobs, strict=True):
            expected = uncached_logprobs(generator.model, generator.params, ids)
            assert token == jnp.argmax(expected[: TOKENIZER.vocab_size])
            np.testing.assert_allclose(logprob, expected[token], atol=2e-5)
            ids.append(token)


def test_a_sample_depends_on_its_seed_and_prompt_alone():
    def run(prompts, seed, num_samples):
        sampling = Sampling(temperature=1.2, num_samples=num_samples, seed=seed)
        return make_generator().generate(prompts, max_new_tokens=24, sampling=sampling)

    many = run(PROMPTS, 7, 3)
    assert [(made.prompt, made.sample) for made in many] == list(np.ndindex(4, 3))
    other = run(PROMPTS, 8, 1)
    assert len({made.ids.tobytes() for made in many + other}) == 16
    for few, same in ((run(PROMPTS[2:3], 7, 3), many[6:9]), (run(PROMPTS, 7, 1), many[::3])):
        for one, expected in zip(few, same, strict=True):
            np.testing.assert_array_equal(one.ids, expected.ids)
            np.testing.assert_allclose(one.logprobs, expected.logprobs, atol=2e-5)


def ids_of(max_new_tokens, sampling):
    made = make_generator().generate(PROMPTS, max_new_tokens=max_new_tokens, sampling=sampling)
    return [m.ids.tolist() for m in made]


def test_a_higher_limit_only_adds_tokens():
    assert [ids[:9] for ids in ids_of(24, GREEDY)] == ids_of(9, GREEDY)


def test_cold_and_top_1_samples_are_greedy():
    assert ids_of(24, Sampling(temperature=1e-6)) == ids_of(24, GREEDY)
    assert ids_of(24, Sampling(top_k=1)) == ids_of(24, GREEDY)


def draws(probabilities, count=4000, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Share of draws of each token: [V]."""
    logits = jnp.log(jnp.asarray(probabilities, jnp.float32))
    ids = jax.jit(choose, static_argnames=("top_k", "nucleus"))(
        jnp.tile(logits, (count, 1)),
        jax.random.split(jax.random.key(3), count),
        np.array([temperature, top_p, min_p], np.float32),
        top_k=top_k,
        nucleus=top_p < 1,
    )
    return np.bincount(ids, minlength=len(probabilities))


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 4]),
        ({"top_p": 0.69}, [1, 4]),
        ({"top_p": 0.71}, [0, 1, 4, 5]),  # 0 and 5 tie
        ({"top_p": 0.96}, [0, 1, 2, 4, 5]),
        ({"top_k": 3, "top_p": 0.75}, [1, 4]),  # 0.4 and 0.3 of the 0.8 that top_k leaves
        ({"top_k": 2}, [1, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4, 5]),
        ({"min_p": 0.3}, [1, 4]),
        ({"min_p": 0.2}, [0, 1, 4, 5]),
        ({"top_p": 0.99, "temperature": 0.02}, [1]),
        ({}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_filters_keep_the_smallest_sets(filters, kept):
    probabilities = np.array([0.1, 0.4, 0.07, 0.03, 0.3, 0.1])
    filters = {**filters, "top_k": min(filters.get("top_k", 0), 6)}
    count = draws(probabilities, **filters)
    assert np.flatnonzero(count).tolist() == kept
    if len(kept) > 1:
        left = probabilities[kept] / probabilities[kept].sum()
        assert scipy.stats.chisquare(count[kept], 4000 * left).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_are_as_frequent_as_softmax_says(temperature):
    generator = make_generator()
    made = generator.generate(
        [PROMPTS[2]],
        max_new_tokens=1,
        sampling=Sampling(temperature=temperature, num_samples=2048, seed=1),
    )
    count = np.bincount([m.ids[0] for m in made], minlength=TOKENIZER.vocab_size)
    ids = [TOKENIZER.bos_id, *PROMPTS[2]]
    logits = uncached_logprobs(generator.model, generator.params, ids)[: TOKENIZER.vocab_size]
    expected = 2048 * np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    order = np.argsort(expected)
    bins = np.minimum(np.cumsum(expected[order]) // 10, 200).astype(int)  # about 10 or more in each
    sums = [np.bincount(bins, weights=x[order]) for x in (count, expected)]
    seen, wanted = (s[sums[1] > 0] for s in sums)
    assert len(wanted) > 20
    assert scipy.stats.chisquare(seen, wanted * 2048 / wanted.sum()).pvalue > 1e-3


def test_no_id_beyond_the_tokenizer_is_drawn():
    made = make_generator().generate(
        PROMPTS, max_new_tokens=24, sampling=Sampling(temperature=1e4, num_samples=3)
    )
    ids = np.concatenate([m.ids for m in made])
    assert 250 <= ids.max() < TOKENIZER.vocab_size


TEXT = "Größe 5 µm; 日本語 — naïve 🙂, then STOP and more."


@pytest.fixture(scope="module")
def memory():
    """A decoder that knows a text by heart: at each position it wants one token, come what may."""
    model, params = model_and_params(
        positions="learned", max_length=128, embed_dim=128, num_layers=1, tie_embeddings=False
    )
    params = jax.tree.map(jnp.zeros_like, params)
    params["norm"] = jax.tree.map(jnp.ones_like, params["norm"])
    params["position"]["weight"] = jnp.eye(128)
    wanted = np.full(128, TOKENIZER.eos_id)
    wanted[: len(TEXT.encode())] = TOKENIZER.encode(TEXT)
    params["head"]["weight"] = jax.nn.one_hot(wanted, 264)
    return model, params


class Dotted(ByteTokenizer):
    """Bytes, each followed by a dot, so that a token has more than one byte."""

    def decode_bytes(self, ids):
        return b"".join(super(Dotted, self).decode_bytes([i]) + b"." for i in ids if i < 256)


def test_eos_ends_a_text(memory):
    generator = Generator(*memory, TOKENIZER)
    whole, rest = generator.generate(["", TEXT[:9]], max_new_tokens=64, sampling=GREEDY)
    assert whole.finished == rest.finished == "eos"
    assert (whole.text, rest.text) == (TEXT, TEXT[9:])
    assert whole.ids.tolist() == [*TEXT.encode(), TOKENIZER.eos_id]
    assert len(whole.logprobs) == len(whole.ids)
    [cut] = generator.generate([""], max_new_tokens=4, sampling=GREEDY)
    assert (cut.finished, cut.data) == ("length", TEXT.encode()[:4])


def stop_cases():
    """(tokenizer, text, stops, what is left), with strings over every place of a chunk."""
    for start in range(0, len(TEXT) - 14, 3):
        for length in (1, 2, 5, 14):
            stop = TEXT[start : start + length]
            yield TOKENIZER, (stop,), TEXT[: TEXT.index(stop)]
    dotted = Dotted().decode(TOKENIZER.encode("then"))
    assert dotted == "t.h.e.n."
    before = Dotted().decode_bytes(TOKENIZER.encode(TEXT[: TEXT.index("then")])).decode("latin1")
    yield Dotted(), ("h.",), before + "t."
    yield Dotted(), (".h.e",), before + "t"  # begins and ends inside of tokens
    yield TOKENIZER, ("STOP", "then STOP"), TEXT[: TEXT.index("then")]  # both end at once
    yield TOKENIZER, ("then STOP and", "STOP"), TEXT[: TEXT.index("STOP")]  # ends first
    yield TOKENIZER, ("STOPS", "absent"), TEXT


def test_stop_strings_cut_exactly_wherever_they_fall(memory):
    for tokenizer, stop, left in stop_cases():
        generator = Generator(*memory, tokenizer)
        sampling = Sampling(temperature=0, stop=stop)
        [made] = generator.generate([""], max_new_tokens=64, sampling=sampling)
        encoding = "latin1" if isinstance(tokenizer, Dotted) else "utf-8"
        assert made.data == left.encode(encoding), stop
        assert made.finished == ("stop" if left != TEXT else "eos")
        decoded = tokenizer.decode_bytes(made.ids)
        before = tokenizer.decode_bytes(made.ids[:-1])
        if made.finished == "stop":  # the last token is the one that completed the stop string
            assert any(s.encode() in decoded for s in stop)
            assert not any(s.encode() in before for s in stop)


@pytest.mark.parametrize("chunk", [1, 3, CHUNK, 64])
@pytest.mark.parametrize("stop", [(), ("STOP",), ("🙂, then",)])
def test_a_stream_is_the_same_bytes_in_whole_characters(memory, chunk, stop):
    generator = Generator(*memory, TOKENIZER)
    sampling = Sampling(temperature=0, stop=stop)
    prompts = ["", TEXT[:9]]
    made = generator.generate(prompts, max_new_tokens=64, sampling=sampling)
    pieces = list(generator.stream(prompts, max_new_tokens=64, sampling=sampling, chunk=chunk))
    for expected in made:
        mine = [piece for piece in pieces if piece.prompt == expected.prompt]
        assert "".join(piece.data.decode() for piece in mine) == expected.text  # strict decoding
        assert [piece.generation is None for piece in mine] == [True] * (len(mine) - 1) + [False]
        last = mine[-1].generation
        assert last.data == expected.data
        assert last.finished == expected.finished
        np.testing.assert_array_equal(last.ids, expected.ids)
    assert chunk == 64 or len(pieces) > 2 * len(made)


def test_a_stream_ends_with_the_bytes_of_an_unfinished_character(memory):
    generator = Generator(*memory, TOKENIZER)
    limit = TEXT.encode().index("日".encode()) + 2
    pieces = list(generator.stream([""], max_new_tokens=limit, sampling=GREEDY, chunk=1))
    assert b"".join(piece.data for piece in pieces) == TEXT.encode()[:limit]
    assert pieces[-1].data == "日".encode()[:2]


def steps_compiled(caplog):
    messages = [record.getMessage() for record in caplog.records]
    return [m for m in messages if re.match(r"Compiling .*(prefill|decode)", m)]


def test_a_bucket_is_compiled_once(caplog):
    def compiled(prompts, max_new_tokens, **fields):
        generator, sampling = make_generator("alibi"), Sampling(**fields)
        caplog.clear()
        with jax.log_compiles():
            made = generator.generate(prompts, max_new_tokens=max_new_tokens, sampling=sampling)
            pieces = generator.stream(
                prompts, max_new_tokens=max_new_tokens, sampling=sampling, chunk=25
            )
            assert sum(piece.generation is not None for piece in pieces) == len(made)
        return steps_compiled(caplog)

    assert compiled([[1] * 20, [2], [3]], 20, top_p=0.3)
    assert compiled([[1] * 32, [2] * 5, [3], []], 32, top_p=0.9, temperature=0.2, seed=5) == []


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([[1], [1] * 50], 15, r"config.model.max_length \(64\).* prompt 1 \(50\).*\(15\) = 65"),
        ([[1, 264]], 4, r"prompt 0: id 264 .*259"),
        ([[-1]], 4, "prompt 0: id -1"),
        ([[1]], 0, r"max_new_tokens \(0\)"),
        ("text", 4, "must be a list"),
    ],
)
def test_what_does_not_fit_is_refused_before_compiling(prompts, max_new_tokens, message, caplog):
    with jax.log_compiles(), pytest.raises(ValueError, match=message):
        make_generator().generate(prompts, max_new_tokens=max_new_tokens)
    assert not caplog.records


def test_what_just_fits_is_accepted():
    make_generator().stream([[1], [258] * 50], max_new_tokens=14)
    assert make_generator().generate([], max_new_tokens=4) == []


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}),
        *({"num_samples": 0}, {"seed": -1}, {"seed": 2**32}, {"stop": ("a", "")}),
        *({"temperature": t} for t in (math.inf, math.nan, 1e7, 9e-7, 1e300, 5e-324)),
        *({"repetition_penalty": p} for p in (0, math.inf, math.nan, 1e300, 1e-300)),
        *({"top_p": 1e-300}, {"top_p": math.nan}, {"min_p": math.nan}),
    ],
)
def test_sampling_out_of_range_is_refused(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, got {re.escape(str(value))}"):
        Sampling(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"length_penalty": 1e3}, {"length_penalty": math.nan}, {"repetition_penalty": 1e300}]
)
def test_a_beam_search_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        BeamSearch(**wrong)


EXTREMES = {
    "temperature": (0.0, 1e-6, 1e6),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1e-300, 1.0),
    "repetition_penalty": (1e-6, 1e6),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in EXTREMES.items() for value in values]
)
def test_the_ends_of_every_range_draw_known_ids_with_finite_probabilities(name, value):
    generator = make_generator()
    for other in ({}, {"temperature": 1e6}, {"temperature": 1e-6, "top_p": 0.5}, {"top_k": 300}):
        sampling = Sampling(**{**other, name: value})
        for made in generator.generate(PROMPTS, max_new_tokens=6, sampling=sampling):
            assert np.isfinite(made.logprobs).all()
            assert made.ids.max(initial=0) < TOKENIZER.vocab_size


def test_scores_that_are_huge_or_equal_are_drawn_from_without_nan():
    keys = jax.random.split(jax.random.key(0), 2)
    logits = jnp.array([[-jnp.inf, -1e30, 1e30, 0.0], [-jnp.inf, 2.0, 2.0, 2.0]])
    for temperature in (1e-6, 1.0, 1e6):
        for top_p in (1e-6, 1.0):
            values = np.array([temperature, top_p, 0.0], np.float32)
            first, second = choose(logits, keys, values, top_k=0, nucleus=top_p < 1).tolist()
            assert first == 2 and second != 0


def test_the_longest_text_of_a_beam_search_has_a_finite_score():
    for penalty in (-1.0, 5.0):
        for stopping in (True, False, "never"):
            search = BeamSearch(length_penalty=penalty, early_stopping=stopping)
            divisors = search.divisors(1_000_000, 1_000_001).astype(np.float32)
            assert np.isfinite(divisors).all() and (divisors > 0).all()


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused():
    model, params = model_and_params(vocab_size=100)
    with pytest.raises(ValueError, match=r"config.model.vocab_size \(100\).*259"):
        Generator(model, params, TOKENIZER)


@pytest.mark.parametrize(
    "mesh",
    [
        (("fsdp", 2), ("tensor", 2)),
        pytest.param((("data", 2), ("sequence", 2)), marks=pytest.mark.slow),
        pytest.param((("data", 8),), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_mesh_makes_the_same_text_and_compiles_once(mesh, caplog):
    sampling = Sampling(top_p=0.9, seed=3)
    generator = Generator(*model_and_params(mesh, **VARIANTS["local_global"]), TOKENIZER)
    with jax.log_compiles():
        pieces = list(generator.stream(PROMPTS, max_new_tokens=24, sampling=sampling, chunk=4))
    assert len(steps_compiled(caplog)) == 2
    found = sorted((p.generation for p in pieces if p.generation), key=lambda g: g.prompt)
    assert [made.ids.tolist() for made in found] == ids_of(24, sampling)


@pytest.fixture(scope="module")
def run_folder(make_experiment, tmp_path_factory):
    """A run with one checkpoint, of parameters never trained."""
    folder = tmp_path_factory.mktemp("run")
    experiment = make_experiment({"model.max_length": 64})
    (folder / "config.json").write_text(conversion.to_json(experiment.config_dict))
    with Checkpoints(str(folder), experiment.config.checkpoint) as checkpoints:
        checkpoints.save(experiment.init_state())
    return folder, experiment


@pytest.mark.parametrize(
    "stream", [pytest.param("--stream", marks=pytest.mark.slow), "--no-stream"]
)
def test_the_script_prints_what_the_generator_makes(run_folder, stream):
    folder, experiment = run_folder
    script = Path(__file__).parent.parent / "scripts" / "generate.py"
    command = [sys.executable, str(script), f"--workdir={folder}", "--max-new-tokens=20"]
    command += ["--top-k=9", "--num-samples=2", "--seed=4", stream]
    streams = {"input": "Größe\n".encode(), "capture_output": True}
    run = subprocess.run(command, env=fake_devices(1), **streams)
    assert run.returncode == 0, run.stderr
    generator = Generator(experiment.model, experiment.init_state().params, TOKENIZER)
    made = generator.generate(
        ["Größe\n"], max_new_tokens=20, sampling=Sampling(top_k=9, num_samples=2, seed=4)
    )
    assert run.stdout == b"".join(
        f"=== prompt 1, sample {i + 1} ===\nGröße\n".encode() + made[i].data + b"\n"
        for i in range(2)
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(["--workdir=/nowhere"], "/nowhere holds no run", marks=pytest.mark.slow),
        (["--max-new-tokens=70"], "config.model.max_length (64)"),
        pytest.param(["--step=7"], "no checkpoint of step 7", marks=pytest.mark.slow),
        pytest.param(["--top-p=0"], "--top-p must be in [1e-06, 1]", marks=pytest.mark.slow),
        (["--temperature=inf"], "--temperature must be 0, which is greedy, or in"),
        pytest.param(
            ["--max-new-tokens=0"],
            "--max-new-tokens must be positive, got 0",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_script_answers_a_mistake_with_one_line(run_folder, args, message):
    run = run_script("generate", f"--workdir={run_folder[0]}", "--prompt=a", *args)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("error: ") and message in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--greedy", "--temperature=1.0", "--top-k=0"],
            "--greedy takes no --temperature, --top-k",
        ),
        (["--num-beams=2", "--greedy"], "--num-beams takes no --greedy"),
        (["--length-penalty=2"], "--length-penalty is for --num-beams"),
        (["--messages=a.jsonl", "--prompt=a"], "--messages takes no --prompt"),
        (["--system=Be brief."], "--system is for --chat"),
    ],
)
def test_flags_without_effect_are_refused(monkeypatch, capsys, flags, message):
    """Explicit ones at their defaults, too."""
    monkeypatch.setattr("sys.argv", ["generate.py", "--workdir=runs/a", *flags])
    with pytest.raises(SystemExit, match="2"):
        generate_script.parse_args()
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_dialogue_in_a_terminal_opens_with_the_model_and_how_to_leave(run_folder):
    folder, experiment = run_folder
    script = Path(__file__).parent.parent / "scripts" / "generate.py"
    flags = [f"--workdir={folder}", "--chat", "--max-new-tokens=4"]
    terminal, other = os.openpty()
    os.write(terminal, b"Hi\n\x04")  # Ctrl-D
    run = subprocess.run(
        [sys.executable, str(script), *flags], stdin=other, capture_output=True, check=True
    )
    os.close(terminal)
    os.close(other)
    count = sum(x.size for x in jax.tree.leaves(experiment.abstract_params))
    first, second, *_ = run.stderr.decode().splitlines()
    assert first.startswith(
        f"{folder}, step 0: {format_quantity(count)} parameters, a context of 64 tok"
    )
    assert "Ctrl-D" in second


def run_in_process(monkeypatch, capfdbinary, *args):
    """The standard output of scripts/generate.py."""
    monkeypatch.setattr(sys, "argv", ["generate.py", *args])
    assert generate_script.main() == 0
    return capfdbinary.readouterr().out


def test_the_script_takes_tokens_that_texts_begin_and_end_with(
    run_folder, monkeypatch, capfdbinary
):
    folder, experiment = run_folder
    flags = [f"--workdir={folder}", "--greedy", "--max-new-tokens=12", "--no-stream"]
    model = experiment.model, experiment.init_state().params, TOKENIZER

    def made(prompt, **options):
        generator = Generator(*model, **options)
        [found] = generator.generate([prompt], max_new_tokens=12, sampling=GREEDY)
        return found

    plain = made("a")
    last = plain.ids[-1]
    ended = made("a", stop_ids=[int(last)])
    assert len(ended.ids) < 12 or last not in plain.ids[:-1]
    for options, expected in (
        (["--prompt=a"], b"a" + plain.data),
        (["--prompt=a", f"--end-ids={last}"], b"a" + ended.data),
        (["--prompt=a", f"--stop-ids={last}"], b"a" + made("a", stop_ids=[258, int(last)]).data),
        (["--prompt=a", "--start-ids="], b"a" + made("a", start=()).data),
        (["--prompt=a", "--start-ids=<pad>,65"], b"a" + made("a", start=(256, 65)).data),
        (["--prompt=<eos>a", "--special-tokens"], b"<eos>a" + made([258, 97]).data),
        (["--prompt=<bos>a", "--special-tokens"], b"<bos>a" + plain.data),  # once
        (["--prompt=<eos>a"], b"<eos>a" + made("<eos>a").data),
    ):
        assert run_in_process(monkeypatch, capfdbinary, *flags, *options) == expected + b"\n"
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags, "--prompt=a", "--end-ids=</s>"])
    with pytest.raises(ValueError, match=r"--end-ids: </s> is neither an id below 259 nor"):
        generate_script.main()
