"""lm-evaluation-harness: the same tasks, documents and figures as with its own model class."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lm.evaluation import lm_eval_adapter
from lm.generation.beam import BeamSearch
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.generation.score import Scorer
from lm.telemetry import jsonl
from lm.telemetry.metrics import EVALUATIONS_FILE
from lm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from tests.test_chat import tokenizer_json  # noqa: F401 - a fixture

make_table = pytest.importorskip("lm_eval.utils").make_table
pytest.importorskip("accelerate", reason="the harness's own model class needs it: lm_eval[hf]")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
llama_pair = pytest.importorskip("tests.llama_pair")

ROOT = Path(__file__).parents[1]
CHOICES = ["small", "brief and kind", "the end of a long day"]


@pytest.fixture(scope="module")
def sides(tokenizer_json):  # noqa: F811
    """(the harness's own model, ours), of the same weights, streams beginning without bos."""
    import tokenizers
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    mine = HuggingFaceTokenizer("tokenizer.json", tokenizer_json.encode())
    size = mine.vocab_size  # no row more: theirs could generate it
    theirs, model, params = llama_pair.make(vocab_size=size, max_length=48, std=0.3)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer_json),
        bos_token="<|begin_of_text|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    own = HFLM(pretrained=theirs, tokenizer=fast, batch_size=4, max_length=48, device="cpu")
    theirs.generation_config.eos_token_id = mine.eos_id
    parts = (model, params, mine)
    return own, lm_eval_adapter.make_model(Scorer(*parts, start=()), Generator(*parts, start=()))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Files of a task of each kind, and of their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    words = ["the", "of", "brief", "user", "system", "in", "日本", "Größe", "42", "day"]
    lines = [
        {"question": " ".join(rng.choice(words, 1 + i)), "answer": int(rng.integers(3))}
        for i in range(12)
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    common = f"""
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {data}}}}}
        test_split: test
        """
    kinds = {
        "choice": """
        output_type: multiple_choice
        doc_to_text: "{{question}}:"
        doc_to_choice: CHOICES
        doc_to_target: answer
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """.replace("CHOICES", str(CHOICES)),
        "rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{question}}"
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
        """,
        "free": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "x"
        generation_kwargs: {until: ["e"], max_gen_toks: 9, do_sample: false}
        metric_list: [{metric: exact_match}]
        """,
    }
    for name, text in kinds.items():
        content = textwrap.dedent(f"task: {name}_of_tests{common}{text}").replace(
            "\n        ", "\n"
        )
        (folder / f"{name}.yaml").write_text(content)
    return [str(folder / f"{name}.yaml") for name in kinds]


def run(model, tasks):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    return simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=10)


def test_documents_and_figures_are_those_of_the_harness(sides, tasks):
    theirs = run(sides[0], tasks)
    ours = lm_eval_adapter.evaluate(sides[1], tasks)
    names = ["choice_of_tests", "rolling_of_tests", "free_of_tests"]
    for name in names:
        a, b = (r["samples"][name] for r in (theirs, ours))
        assert len(a) == len(b) == 12
        for mine, other in zip(b, a, strict=True):
            assert mine["doc"] == other["doc"]
            if name == "choice_of_tests":
                for (x, greedy), (y, expected) in zip(
                    mine["filtered_resps"], other["filtered_resps"], strict=True
                ):
                    np.testing.assert_allclose(float(x), float(y), atol=1e-4)
                    assert greedy == expected
            elif name == "rolling_of_tests":
                np.testing.assert_allclose(
                    mine["filtered_resps"], other["filtered_resps"], atol=2e-4
                )
            else:
                assert mine["filtered_resps"] == other["filtered_resps"]
    figures = [
        {k: v for k, v in r["results"]["choice_of_tests"].items() if "stderr" not in k}
        for r in (theirs, ours)
    ]
    assert figures[0] == figures[1] and 0 < figures[0]["acc,none"] < 1
    assert len({str(s["filtered_resps"]) for s in ours["samples"]["free_of_tests"]}) > 6
    assert "|choice_of_tests|" in make_table(ours).replace(" ", "")  # as the script prints it


def test_requests_without_a_context_or_with_one_too_long_are_scored_alike(sides):
    pairs = [("", "brief"), ("the of " * 40, "user"), ("a ", "b"), ("", " the of brief" * 3)]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    theirs, ours = (side.loglikelihood(requests, disable_tqdm=True) for side in sides)
    for (x, greedy), (y, expected) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
        assert greedy == expected
    long = [SimpleNamespace(args=("the of brief kind " * 40,))]
    x, y = (side.loglikelihood_rolling(long, disable_tqdm=True)[0] for side in sides)
    np.testing.assert_allclose(x, y, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"until": ["\n"], "max_gen_toks": 5}, (5, Sampling(temperature=0, stop=("\n",)), ("\n",))),
        ({"until": "a", "do_sample": False}, (256, Sampling(temperature=0, stop=("a",)), ("a",))),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 3},
            (3, Sampling(temperature=0.7, top_p=0.9), ()),
        ),
        ({"temperature": 0.5}, (256, Sampling(temperature=0.5), ())),
        ({"temperature": 0.0}, (256, Sampling(temperature=0), ())),
        ({"num_beams": 3, "length_penalty": 2.0}, (256, BeamSearch(3, 2.0), ())),
    ],
)
def test_generation_arguments_of_tasks(arguments, expected):
    assert lm_eval_adapter.continue_by(arguments) == expected


@pytest.mark.parametrize("wrong", [{"top_q": 1}, {"num_beams": 2, "do_sample": True}])
def test_unknown_generation_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="generation_kwargs"):
        lm_eval_adapter.continue_by(wrong)


def test_a_task_that_is_not_there_is_refused(sides):
    with pytest.raises(ValueError, match=r"nowhere.yaml: no such file"):
        lm_eval_adapter.evaluate(sides[1], ["nowhere.yaml"])


@pytest.mark.slow
def test_tasks_inside_a_run_have_the_figures_of_the_scripts_afterwards(tasks, tmp_path):
    """scripts/lm_eval.py lies beside the scripts, and is not the package of its name."""
    run = f"--workdir={tmp_path}/run"

    def script(name, *flags):
        command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), run, *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    added = "--config.evaluations.harness."
    flags = (f"{added}name=lm_eval", f"{added}tasks={tuple(tasks)}", f"{added}every=4")
    smoke = (f"--config={ROOT}/configs/smoke.py", "--config.train.num_steps=8")
    rows = ("--config.data.length=64", "--config.model.max_length=64")
    script("train", *smoke, *rows, "--config.optimizer.ema_decay=0.0", *flags)
    records = jsonl.read(f"{tmp_path}/run/{EVALUATIONS_FILE}")
    assert [record["step"] for record in records] == [4, 8]
    after = json.loads(script("evaluate", "--evaluations=harness").splitlines()[-1])
    assert {**after, "seconds": 0} == {**records[-1], "seconds": 0}
    scores = tmp_path / "scores.json"
    script("lm_eval", f"--tasks={','.join(tasks)}", f"--json={scores}")
    found = lm_eval_adapter.figures(json.loads(scores.read_text()))
    assert len(found) > 5 and found == {name: records[-1].get(name) for name in found}
