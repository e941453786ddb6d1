"""Models for EleutherAI's lm-evaluation-harness (the package `lm_eval`), on any mesh."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.evaluation.predict import continuations
from lm.generation.beam import BeamSearch
from lm.generation.chat import Chat
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.generation.score import Report, Scorer
from lm.telemetry.metrics import ERROR_SUFFIX
from lm.telemetry.progress import Progress

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

MAX_NEW_TOKENS = 256  # unless a task gives it
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # names that tasks use for it


def make_model(
    scorer: Scorer,
    generator: Generator,
    *,
    chat: Chat | None = None,
    batch_size: int = 16,
    report: Report | None = None,
) -> LM:
    """An `lm_eval.api.model.LM` that can do all three kinds of request.

    chat: for tasks that are asked in a dialogue. batch_size: prompts that are continued together;
    scoring fills batches by tokens. report: called with the requests done of a kind, and their
    count; None: they are shown.

    Every stream begins as those of `scorer` do, with bos. Where they begin with nothing, a request
    without a context is scored after bos all the same. Contexts that are too long lose their
    beginning.
    """
    from lm_eval.api.model import TemplateLM

    tokenizer, progress, reported = scorer.tokenizer, Progress(), report
    limit = scorer.model.config.max_length

    class Model(TemplateLM):
        backend = "seq2seq" if scorer.takes_encoder else "causal"
        has_chat = chat is not None

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_id

        @property
        def prefix_token_id(self) -> int:  # before a request without a context
            return tokenizer.bos_id

        @property
        def tokenizer_name(self) -> str:  # of caches of requests
            return tokenizer.fingerprint

        def tok_encode(  # pyright: ignore
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            encode = tokenizer.encode if chat is None else tokenizer.encode_special
            ids = encode(string).tolist()
            is_start = chat is not None and scorer.start.tolist() == ids[:1] != []
            return ids[1:] if is_start else ids  # the scorer puts it first

        def _loglikelihood_tokens(  # pyright: ignore
            self,
            requests: list[tuple[tuple[str, str], list[int], list[int]]],
            disable_tqdm: bool = False,
            **kwargs: Any,
        ) -> list[tuple[float, bool]]:
            begins = scorer.takes_encoder or len(scorer.start) > 0  # no request needs the prefix
            contexts = [[] if begins and not text else ids for (text, _), ids, _ in requests]
            continuations = [ids for _, _, ids in requests]
            report = reported or _reporter(progress, "scored", disable_tqdm)
            scores = scorer.score(contexts, continuations, report=report)
            return [(score.logprob, score.is_greedy) for score in scores]

        def loglikelihood_rolling(
            self, requests: list[Instance], disable_tqdm: bool = False
        ) -> list[float]:
            texts = [self.tok_encode(request.args[0]) for request in requests]
            if not len(scorer.start):  # the tokens after bos are scored
                texts = [[tokenizer.bos_id, *ids] for ids in texts]
            report = reported or _reporter(progress, "scored windows", disable_tqdm)
            return [score.logprob for score in scorer.rolling(texts, report=report)]

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
            report = reported or _reporter(progress, "generated", disable_tqdm)
            groups: dict[tuple, list[int]] = {}
            for i, request in enumerate(requests):
                arguments: Any = request.args[1]  # pyright: ignore
                groups.setdefault(continue_by(arguments), []).append(i)
            texts: dict[int, str] = {}
            for (count, sampling, until), members in groups.items():
                room = limit if scorer.takes_encoder else limit - count
                if room < 1:
                    raise ValueError(
                        f"a task asks for {count} tokens: config.model.max_length ({limit}) must "
                        "be larger"
                    )
                prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
                for found in continuations(generator, prompts, batch_size, count, sampling):
                    texts |= {members[i]: _before(text, until) for i, text in found.items()}
                    report(len(texts), len(requests))
            return [texts[i] for i in range(len(requests))]

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            if chat is None:
                raise ValueError("this model was made without a chat template")
            return chat.render(chat_history, add_generation_prompt=add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return None if chat is None else chat.source

    return Model()


def continue_by(arguments: dict[str, Any]) -> tuple[int, Sampling | BeamSearch, tuple[str, ...]]:
    """(most new tokens, how to continue, stop strings) of a task's generation_kwargs; ValueError
    where one is unknown.
    """
    rest = dict(arguments)
    lengths = [rest.pop(name) for name in LENGTHS if name in rest]
    until = rest.pop("until", None) or ()
    until = (until,) if isinstance(until, str) else tuple(text for text in until if text)
    num_beams = rest.pop("num_beams", 1)
    sample = rest.pop("do_sample", rest.get("temperature", 0) > 0)
    temperature = rest.pop("temperature", 1.0) if sample else rest.pop("temperature", 0) * 0.0
    names = ("length_penalty", "early_stopping") if num_beams > 1 else ("top_k", "top_p", "min_p")
    chosen = {name: rest.pop(name) for name in (*names, "repetition_penalty") if name in rest}
    if rest or (sample and num_beams > 1):
        raise ValueError(
            f"generation_kwargs {arguments}: unknown are {', '.join(rest) or 'beams that sample'}"
        )
    count = int(lengths[0]) if lengths else MAX_NEW_TOKENS
    if num_beams > 1:
        return count, BeamSearch(num_beams=num_beams, **chosen), until
    return count, Sampling(temperature=temperature, stop=until, **chosen), until


def _before(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string: beams don't stop at them."""
    return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]


def _reporter(progress: Progress, verb: str, quiet: bool) -> Report:
    def report(done: int, count: int) -> None:
        if not quiet:
            progress.show(f"{verb} {done}/{count}", final=done == count)

    return report


def evaluate(
    model: LM, tasks: Sequence[str], *, num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """The results of the harness for a model of `make_model`.

    tasks: as of `find`.
    """
    from lm_eval.evaluator import simple_evaluate

    # its bootstrap would fork this process, which has threads of XLA that may hold locks
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    results = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=find(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=getattr(model, "has_chat", False),
        bootstrap_iters=1000,
    )
    assert results is not None, "of the first process"
    return dict(results)


def find(tasks: Sequence[str]) -> TaskManager:
    """The harness's table of tasks: names, or YAML files; ValueError where one is neither. With
    files alone the harness's own tasks are not even looked up.
    """
    from lm_eval.tasks import TaskManager

    files = [task.endswith((".yaml", ".yml")) for task in tasks]
    for task, is_file in zip(tasks, files, strict=True):
        if is_file and not Path(task).is_file():
            raise ValueError(f"task {task}: no such file")
    manager = TaskManager(include_defaults=not all(files))
    unknown = [t for t, f in zip(tasks, files, strict=True) if not (f or manager.match_tasks([t]))]
    if unknown:
        raise ValueError(f"the harness has no task {', '.join(unknown)}")
    return manager


def load(tasks: Sequence[str]) -> None:
    """Read the data of tasks, as of `find`. Raises ValueError or OSError where one is missing."""
    from lm_eval.tasks import get_task_dict

    get_task_dict(list(tasks), find(tasks))


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """{TASK/METRIC: value} of the harness's results, with TASK/METRIC_stderr beside it, and with
    the filter of the answers in METRIC where it has a name.
    """
    found: dict[str, float] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or not isinstance(value, int | float):  # an alias; "N/A"
                continue
            name, suffix = metric.removesuffix(ERROR_SUFFIX), metric.endswith(ERROR_SUFFIX)
            name = f"{task}/{name}" + (f".{chosen}" if chosen != "none" else "")
            found[name + ERROR_SUFFIX * suffix] = float(value)
    return found
