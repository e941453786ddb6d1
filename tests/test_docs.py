"""The README and the pages of docs/: their commands exist, and run; their links lead somewhere."""

import dataclasses
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from lm import cli
from scripts.project import config_page, lint_prose

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = "# not run by a test: "
# Commands that other tests run, or CI's own script.
ELSEWHERE = {
    "make": "tests/test_pretrain.py, .ci/run",
    "pip": "tests/test_packaging.py, .ci/run",
    "PYTHONPATH=.": "tests/test_extending.py",
}


@dataclasses.dataclass(frozen=True)
class Block:
    page: Path
    text: str

    @property
    def marked(self):
        return self.text.startswith(MARK)

    @property
    def commands(self):
        """Its lines, each with those that a backslash joins to it, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page):
    return [Block(page, text) for text in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)]


BLOCKS = [block for page in PAGES for block in blocks(page)]


class Parsed(BaseException):
    """Raised in place of the work of a script."""


def parse(script, arguments, monkeypatch):
    """Parse the arguments by the script's own flags, and its config with them; run no more."""

    parse_args = cli.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(os, "execv", lambda *_: None)  # lm_eval.py starts itself again
        patch.setattr(cli, "run", lambda main: main())
        patch.setattr(cli.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_exist_with_their_flags(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for words in [words for block in blocks(page) for words in block.commands]:
        while re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        program, arguments = words[0], words[1:]
        if program == "make":
            assert arguments[0] in targets
        elif program in ("python", "lm") or program.startswith("scripts/launch/"):
            if program == "python":
                assert arguments[0] == "scripts/launch/local.py" and arguments.count("--") == 1
                arguments = arguments[arguments.index("--") + 1 :]
                script, arguments = ROOT / arguments[0], arguments[1:]
            elif program == "lm":
                script = ROOT / "scripts" / f"{arguments[0].replace('-', '_')}.py"
                arguments = arguments[1:]
            else:
                assert (ROOT / program).exists()
                script = ROOT / "scripts" / "train.py"
                arguments = [a for a in arguments if a.startswith("--")]
            assert script.exists(), words
            if any(re.search(r"[=:](runs/|mine)", a) for a in arguments if "--config=" in a):
                arguments = [a for a in arguments if not a.startswith("--config=")]
                arguments.append("--config=configs/imported.py")
            parse(
                script,
                [a for a in arguments if "gamma" not in a and "momentum" not in a],
                monkeypatch,
            )
        else:
            assert program == "pip", words


def test_commands_that_are_not_run_say_why():
    for block in BLOCKS:
        assert not block.marked or len(block.text.splitlines()[0]) > len(MARK), block.text


def test_links_lead_to_files_and_headings():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if link.startswith("http"):
                continue
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
                anchors = [
                    re.sub(r"[^\w -]", "", t).strip().lower().replace(" ", "-") for t in titles
                ]
                assert heading in anchors, f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    named = re.findall(r"`([\w/]+\.(?:py|sh|sbatch|yaml|csv))`", page.read_text())
    own = {"mine.py", "lm/models/mine.py", "lm/objectives/mine.py", "lm/optim/optimizers/mine.py"}
    homes = (ROOT, ROOT / "lm", ROOT / "configs", ROOT / "scripts" / "launch", ROOT / "scripts")
    assert not [n for n in named if n not in own and not any((h / n).exists() for h in homes)]


def test_every_page_is_reached_from_the_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page not in seen:
            seen.add(page)
            links = re.findall(r"\]\(([\w./]+\.md)", page.read_text())
            todo += [(page.parent / link).resolve() for link in links]
    assert set(PAGES) <= seen


def test_the_page_of_the_config_is_that_of_the_code():
    assert config_page.PAGE.read_text() == config_page.page(), "run `make docs`"


def test_the_readme_has_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


def test_the_python_of_the_readme_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    [program, config] = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.S)
    names = {}
    exec(program.replace("num_steps = 32, 8, 100", "num_steps = 32, 8, 3"), names)
    assert names["logits"].shape == (8, 32, 264)
    exec(config, names)
    names["get_config"]().lock()


@pytest.fixture
def folder(tmp_path):
    """A folder with what the pages assume: the project's files, texts, pairs, a checkpoint."""
    for name in ("configs", "scripts", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "text").mkdir()
    for path in Path(sysconfig.get_path("stdlib"), "json").glob("*.py"):
        (tmp_path / "text" / path.name).write_text(path.read_text())
    sums = [(f"what is {i} + {i}?", str(2 * i)) for i in range(400)]
    (tmp_path / "pairs.tsv").write_text("".join(f"{q}\t{a}\n" for q, a in sums))
    lines = (json.dumps({"text": f"user: {q}\nassistant: {a}"}) for q, a in sums)
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(words, folder):
    """Run a command of a page; `lm` and `python` are those of this process."""
    program = {"lm": [sys.executable, "-m", "lm"], "python": [sys.executable]}[words[0]]
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("=8", "=2")}
    done = subprocess.run(
        [*program, *words[1:]], cwd=folder, env=environment, capture_output=True, errors="replace"
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


CHECKPOINT = """
lm pretrain --data=text --workdir=runs/tiny --config.train.num_steps=2 --config.data.length=64 \
    --config.model.num_layers=1 --config.model.embed_dim=32 --config.model.vocab_size=600 \
    --config.model.activation=swiglu --config.model.max_length=64 --config.train.eval_every=0 \
    --config.checkpoint.every=0 --config.optimizer.schedule.warmup_steps=1
lm hf-export --workdir=runs/tiny --out=SmolLM2-135M
"""


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page, folder):
    todo = [w for b in blocks(page) if not b.marked for w in b.commands]
    todo = [words for words in todo if words[0] not in ELSEWHERE]
    if page.name == "README.md":
        todo = [*Block(page, CHECKPOINT).commands, *todo]
    for words in todo:
        run(words, folder)


@pytest.mark.parametrize(
    ("source", "complaints"),
    [
        ('"""How it works."""', ["opens with How"]),
        ('def f():\n    """Whether x."""', ["opens with Whether"]),
        ('"""Sums. Is it so?"""', ["asks a question"]),
        ('"""Sums.\n\nOne line of prose that goes\non and\nthen ends in a third one.\n"""', [2]),
        ("# One line of prose that goes\n# on\n# and ends in a third one.", [1]),
        ('"""Sums.\n\nOne line of prose that goes on and\nends here.\n"""', []),
        ('"""Howitzers: a list\n\n    x   the first\n    y\n    z   the last\n"""', []),
    ],
)
def test_the_lint_of_prose_finds_what_it_names(source, complaints):
    found = [text for _, text in lint_prose.findings(source)]
    assert found == [
        f"a line of {c}: on{' and' * (c - 1)}" if c in (1, 2) else c for c in complaints
    ]


@pytest.mark.parametrize("room", ["lm", "scripts", "configs", "tests"])
def test_prose_reads_like_a_manual(room):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {complaint}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for line, complaint in lint_prose.findings(path.read_text())
    ]
    assert not found
