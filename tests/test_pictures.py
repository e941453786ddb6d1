"""Drawing: codes by the cache equal those of whole rows, guidance, PNG grids, the scripts."""

import dataclasses
import io
import json
import re
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from lm.config.conversion import default
from lm.data import shapes
from lm.data.pipeline import make_source
from lm.evaluation.drawings import compare
from lm.evaluation.ranking import PictureRanker, best_first
from lm.generation.pictures import Painter, grid_png
from lm.generation.sampling import Sampling
from lm.layers.cross_entropy import part_of_head
from lm.storage import files
from lm.training.experiment import Experiment
from lm.training.loop import train
from lm.training.picture_codes import PictureCoder, coder_of, write_store
from lm.types import Tokens
from scripts import evaluate as evaluate_script
from scripts import generate as generate_script
from tests.test_picture_codes import vqvae_config

GREEDY = Sampling(temperature=0)
PROMPTS = ["a red circle", "b"]
FIRST, COUNT = 264, 16  # the id of code 0; codes of a picture


def dalle_config(*, encoder=False, data="synthetic:codes:64"):
    model = "encoder_decoder" if encoder else "decoder"
    config = default(model=model, objective="dalle")
    config.objective.update({"grid_size": 4, "num_codes": 12, "caption_dropout": 0.2})
    sizes = {"num_layers": 2, "embed_dim": 16, "num_heads": 4, "mlp_dim": 32, "init_std": 0.4}
    config.model.update({**sizes, "vocab_size": FIRST + 12, "max_length": 64})
    config.model.positions = "learned"
    config.data.length, config.data.encoder_length = (16, 40) if encoder else (56, None)
    config.data.train, config.data.batch_size = (data,), 8
    config.loader.kind, config.train.num_steps = "thread", 1
    config.log.parameter_table, config.log.trackers = False, ("jsonl",)
    return config


def painter_of(experiment, **changes):
    state = experiment.init_state()
    config = dataclasses.replace(experiment.config.objective, **changes)
    made = experiment.model, state.params, experiment.tokenizer, config
    return Painter(*made, experiment.model_interface), state.params


@pytest.fixture(scope="module", params=[False, True], ids=["decoder", "encoder_decoder"])
def drawn(request):
    """(experiment, painter, params) of an untrained model."""
    experiment = Experiment(dalle_config(encoder=request.param), jax.devices()[:1])
    return experiment, *painter_of(experiment)


def logits_of_row(experiment, params, prompt, codes):
    """float32 [COUNT, codes] of a row as training has it, without a cache."""
    tokenizer = experiment.tokenizer
    caption = [*tokenizer.encode(prompt), tokenizer.eos_id] if prompt else [tokenizer.eos_id]
    inputs = np.concatenate([[tokenizer.bos_id], caption, codes[:-1] + FIRST])
    positions = np.concatenate([np.arange(len(caption)), 40 + np.arange(COUNT)])
    encoder = None
    if experiment.config.model.takes_encoder:
        of = np.array([caption], np.int32)
        encoder = Tokens(of, np.ones_like(of), np.arange(of.size, dtype=np.int32)[None])
        inputs, positions = np.append(tokenizer.bos_id, codes[:-1] + FIRST), np.arange(COUNT)
    ids = inputs[None].astype(np.int32)
    tokens = Tokens(ids, np.ones_like(ids), positions[None].astype(np.int32))
    output = experiment.model.apply({"params": params}, tokens, encoder=encoder)
    head, own = part_of_head(experiment.model, params, (FIRST, FIRST + 12))
    own = {**dict.fromkeys(params), **own}
    return np.asarray(head.apply({"params": own}, output.hidden, method="logits"))[0, -COUNT:]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_codes_are_the_likeliest_of_whole_rows(drawn, guidance):
    experiment, painter, params = drawn
    codes, logprobs = painter.draw(PROMPTS, sampling=GREEDY, guidance=guidance)
    assert codes.shape == (2, 1, COUNT) and codes.min() >= 0 and codes.max() < 12
    for prompt, [row], [logprob] in zip(PROMPTS, codes, logprobs, strict=True):
        plain = logits_of_row(experiment, params, prompt, row)
        empty = logits_of_row(experiment, params, "", row)
        guided = empty + guidance * (plain - empty)
        margin = guided.max(1) - guided[np.arange(COUNT), row]
        assert margin.max() < 1e-3, margin
        log_p = plain - np.logaddexp.reduce(plain, axis=1, keepdims=True)
        assert logprob == pytest.approx(log_p[np.arange(COUNT), row].sum(), rel=1e-4)
    assert len(np.unique(codes)) > 1


def test_guidance_of_one_is_none_and_more_of_it_changes_codes(drawn):
    _, painter, _ = drawn
    sampling = Sampling(num_samples=2, seed=3)
    plain, _ = painter.draw(PROMPTS, sampling=sampling)
    nearly, _ = painter.draw(PROMPTS, sampling=sampling, guidance=1 + 1e-6)
    np.testing.assert_array_equal(plain, nearly)
    strong, _ = painter.draw(PROMPTS, sampling=sampling, guidance=8.0)
    assert (strong != plain).mean() > 0.1


def test_a_drawing_depends_on_its_prompt_and_number_alone(drawn):
    _, painter, _ = drawn
    both, _ = painter.draw(PROMPTS, sampling=Sampling(num_samples=3))
    one, _ = painter.draw(PROMPTS[1:], sampling=Sampling(num_samples=2))
    np.testing.assert_array_equal(both[1, :2], one[0])
    assert (both[0, 0] != both[0, 1]).any() and (both[0, 0] != both[1, 0]).any()
    other, _ = painter.draw(PROMPTS[1:], sampling=Sampling(num_samples=2, seed=1))
    assert (other != one).any()


def test_eight_devices_draw_the_same(drawn):
    experiment, painter, params = drawn
    eight = Experiment(experiment.config_dict, jax.devices())
    shardings = jax.tree.map(lambda x: x.sharding, eight.abstract_params)
    own = jax.device_put(jax.device_get(params), shardings)
    objective = experiment.config.objective
    other = Painter(eight.model, own, eight.tokenizer, objective, eight.model_interface)
    for guidance in (1.0, 2.0):
        codes = [p.draw(PROMPTS, sampling=GREEDY, guidance=guidance)[0] for p in (painter, other)]
        np.testing.assert_array_equal(*codes)


def test_long_prompts_are_refused(drawn):
    _, painter, _ = drawn
    with pytest.raises(ValueError, match="prompt 1 has 41 tokens with its eos: captions of this"):
        painter.draw(["a", "b" * 40])


def test_a_grid_has_a_row_for_each_prompt():
    pictures = np.zeros((2, 3, 16, 16, 3), np.uint8)
    pictures[1, 2] = [0, 0, 255]
    image = Image.open(io.BytesIO(grid_png(pictures)))
    assert image.size == (3 * 128 + 2 * 4, 2 * 128 + 4)
    assert image.getpixel((391, 259)) == (0, 0, 255) and image.getpixel((0, 0)) == (0, 0, 0)
    assert image.getpixel((129, 0)) == (255, 255, 255)


def test_drawings_are_compared_part_by_part():
    scenes = shapes.arrangements("held_out")[:8]
    numbers = np.arange(314)
    found = shapes.scene_numbers(numbers, seed=0, split="held_out").tolist()
    images = shapes.draw(numbers, size=32, seed=0, split="held_out")
    images = images[[found.index(i) for i in range(8)]]
    assert compare(scenes, images) == {
        "drawings": 8.0,
        **dict.fromkeys(("right", "colors", "shapes", "relation", "readable"), 1.0),
    }
    wrong = [scene._replace(color="none") for scene in scenes[:4]]
    wrong += [scene._replace(shape="none") for scene in scenes[4:]]
    images[0] = 0
    values = compare(wrong, images)
    assert (values["right"], values["colors"], values["shapes"]) == (0.0, 0.5, 3 / 8)
    assert values["relation"] == values["readable"] == 7 / 8


# ---- scripts ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(run of a VQ-VAE, store of its codes, run of DALL-E on it)."""
    root = tmp_path_factory.mktemp("pictures")
    vqvae, store, run = (str(root / name) for name in ("vqvae", "codes", "dalle"))
    devices = jax.devices()[:1]
    assert train(vqvae_config(), vqvae, devices) == 0
    write_store(PictureCoder(vqvae, devices), "synthetic:shapes:16", store)
    config = dalle_config(data=store)
    config.data.length = 64  # captions of 48 bytes
    assert train(config, run, devices) == 0
    return vqvae, store, run


def run_script(script, monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", [script.__name__, *args])
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    assert script.main() == 0
    return capsys.readouterr().out


def test_a_prompt_becomes_a_picture(folders, tmp_path, monkeypatch, capsys):
    vqvae, _, run = folders
    out = str(tmp_path / "picture.png")
    flags = [f"--workdir={run}", f"--out={out}", "--num-samples=2", "--guidance=2"]
    flags += ["--prompt=a red circle above a blue square", "--prompt=b"]
    printed = run_script(generate_script, monkeypatch, capsys, *flags)
    assert f"{out}, row 1: a red circle above a blue square\n" in printed
    with Image.open(out) as image:
        assert image.size == (260, 260) and image.format == "PNG"
        first = np.asarray(image)
    run_script(generate_script, monkeypatch, capsys, *flags, f"--vqvae={vqvae}")
    with Image.open(out) as image:
        np.testing.assert_array_equal(np.asarray(image), first)


@pytest.mark.parametrize("count", [20, 9, 3])
def test_a_picture_has_pictures_above_their_reconstructions(
    folders, folder, monkeypatch, capsys, count
):
    out, data = f"{folder}/picture.png", f"synthetic:shapes:{count}:1"
    flags = [f"--workdir={folders[0]}", f"--data={data}", f"--reconstructions={out}"]
    line, last = run_script(evaluate_script, monkeypatch, capsys, *flags).splitlines()
    values, shown = json.loads(line), {20: 16, 9: 8, 3: 3}[count]
    assert last == f"{out}: {shown} pictures of {data}, each above its reconstruction"
    coder = PictureCoder(folders[0], jax.local_devices()[:1])
    images = shapes.draw(np.arange(count), size=16, seed=1)
    made = coder.decode(coder.encode(images))
    error = np.square((made.astype(float) - images) / 255).mean()
    assert values["squared_error"] == pytest.approx(error, rel=0.02)  # rounded pixels
    assert values["psnr"] == pytest.approx(-10 * np.log10(values["squared_error"]), rel=1e-6)
    assert values["codes_used"] == len(np.unique(coder.encode(images)))
    with Image.open(io.BytesIO(files.read_bytes(out))) as image:
        pixels = np.asarray(image)
    columns = min(count, 8)
    assert pixels.shape == (132 * 2 * shown // columns - 4, 132 * columns - 4, 3)
    numbers = np.linspace(0, count - 1, shown).round().astype(int)
    for i, number in enumerate(numbers):
        y, x = 264 * (i // columns), 132 * (i % columns)
        for top, picture in ((y, images[number]), (y + 132, made[number])):
            found = pixels[top : top + 128 : 8, x : x + 128 : 8]
            np.testing.assert_array_equal(found, picture)


def test_the_share_of_right_drawings_is_printed(folders, monkeypatch, capsys):
    flags = [f"--workdir={folders[2]}", "--drawings=3", "--temperature=0.5"]
    printed = run_script(evaluate_script, monkeypatch, capsys, *flags)
    assert '"drawings": 3' in printed and '"right": 0' in printed


def test_mistakes_are_named(folders, monkeypatch, capsys):
    vqvae, _, run = folders
    for args, message in (
        ([f"--workdir={run}"], "draws pictures: give --out=picture.png"),
        ([f"--workdir={vqvae}", "--out=a.png"], "objective.name=dalle, not of vqvae"),
        ([f"--workdir={run}", "--out=a.png", f"--vqvae={run}"], "name=decoder, not of a vqvae"),
    ):
        with pytest.raises(ValueError, match=message):
            run_script(generate_script, monkeypatch, capsys, *args, "--prompt=a")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="are not those of the"):
        patch.setattr(PictureCoder, "fingerprint", "0" * 64)
        flags = [f"--workdir={run}", "--out=a.png", f"--vqvae={vqvae}", "--prompt=a"]
        run_script(generate_script, monkeypatch, capsys, *flags)
    with pytest.raises(ValueError, match=r"objective\.name=dalle, this run's is vqvae"):
        run_script(evaluate_script, monkeypatch, capsys, f"--workdir={vqvae}", "--drawings=2")
    with pytest.raises(ValueError, match=r"objective\.name=vqvae, this run's is dalle"):
        flags = [f"--workdir={run}", "--reconstructions=a.png", "--data=synthetic:codes:8"]
        run_script(evaluate_script, monkeypatch, capsys, *flags)
    for args, message in (
        (["--reconstructions=a.jpg"], "--reconstructions=a.jpg: pictures are written as .png"),
        (["--reconstructions=a.png", "--drawings=2"], "--drawings for a decoder of its codes"),
    ):
        with pytest.raises(SystemExit):
            run_script(evaluate_script, monkeypatch, capsys, f"--workdir={vqvae}", *args)
        assert message in capsys.readouterr().err
    for args, message in (
        (["--out=a.jpg"], "--out=a.jpg: pictures are written as .png"),
        (["--out=a.png", "--max-new-tokens=4"], "--out takes no --max-new-tokens"),
        (["--out=a.png", "--guidance=-1"], "--guidance=-1.0: give a number from 0 to 100"),
        (["--guidance=2"], "--guidance is for --out"),
    ):
        monkeypatch.setattr("sys.argv", ["generate.py", f"--workdir={run}", *args])
        with pytest.raises(SystemExit):
            generate_script.parse_args()
        assert message in capsys.readouterr().err


def test_a_run_on_data_without_origin_needs_the_folder_of_the_vqvae(drawn):
    with pytest.raises(ValueError, match="--vqvae=RUN: no store of"):
        coder_of(drawn[0], None, jax.devices()[:1])


# ---- ranking ----


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory):
    """The folder of a contrastive run of one step, on pictures of 24 pixels."""
    config = default(model="clip", objective="contrastive")
    sizes = {"num_layers": 1, "embed_dim": 16, "num_heads": 2, "mlp_dim": 16}
    config.model.vision.update({**sizes, "patch_size": 8})
    config.model.text.update(sizes)
    config.model.update({"embedding_dim": 8, "image_size": 24, "max_length": 48, "vocab_size": 264})
    config.data.length, config.data.batch_size = 48, 8
    config.data.train = ("synthetic:shapes:64",)
    config.loader.kind, config.train.num_steps = "thread", 1
    config.log.parameter_table, config.log.trackers = False, ("jsonl",)
    folder = str(tmp_path_factory.mktemp("contrastive"))
    assert train(config, folder, jax.devices()[:1]) == 0
    return folder


def test_similarities_are_those_of_the_rows_that_training_reads(contrastive):
    ranker = PictureRanker(contrastive, jax.devices()[:1])
    images = shapes.draw(np.arange(6), size=24, seed=0)
    prompts = shapes.captions(np.arange(2), seed=0)
    found = ranker.similarities(prompts, images.reshape(2, 3, *images.shape[1:]))
    experiment = ranker.experiment
    objective = experiment.objective.for_evaluation()
    source = make_source(
        "synthetic:shapes:64", experiment.config.data, objective.layout, experiment.tokenizer
    )
    batch = objective(source.read(np.arange(6)), None)
    hidden = experiment.model.apply(
        {"params": ranker._params}, batch.inputs, images=batch.images
    ).hidden
    expected = np.einsum("ne,nse->ns", hidden[:2, 1], hidden[:, 0].reshape(2, 3, -1))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(found) > 1e-3
    with pytest.raises(ValueError, match=r"--rank=.*: the text 'bbb.*has 48 tokens, and with eos"):
        ranker.similarities(["a", "b" * 48], np.zeros((2, 1, 24, 24, 3), np.uint8))


def test_the_best_picture_of_a_row_is_its_first():
    scores = np.array([[0.1, 0.3, 0.2], [0.5, 0.4, 0.6]], np.float32)
    pictures, ordered = best_first(np.arange(6).reshape(2, 3), scores)
    np.testing.assert_array_equal(pictures, [[1, 2, 0], [5, 3, 4]])
    np.testing.assert_array_equal(ordered, np.float32([[0.3, 0.2, 0.1], [0.6, 0.5, 0.4]]))


def test_the_script_ranks(folders, contrastive, tmp_path, monkeypatch, capsys):
    out, run = str(tmp_path / "ranked.png"), folders[2]
    flags = [f"--workdir={run}", f"--out={out}", "--num-samples=2", "--prompt=a red circle"]
    printed = run_script(generate_script, monkeypatch, capsys, *flags, f"--rank={contrastive}")
    [first, second] = re.findall(r"-?\d\.\d{3}", printed)
    assert float(first) >= float(second)
    with pytest.raises(ValueError, match=r"objective\.name=dalle, not of contr"):
        run_script(generate_script, monkeypatch, capsys, *flags, f"--rank={run}")
