"""Models for EleutherAI's lm-evaluation-harness (the package `lm_eval`), on any mesh."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.generation.beam import BeamSearch
from lm.generation.chat import Chat
from lm.generation.generator import Generator
from lm.generation.sampling import Sampling
from lm.generation.score import Report, Scorer
from lm.telemetry.progress import Progress

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

MAX_NEW_TOKENS = 256  # unless a task gives it
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # names that tasks use for it


def make_model(
    scorer: Scorer,
    generator: Generator,
    *,
    chat: Chat | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> LM:
    """An `lm_eval.api.model.LM` that can do all three kinds of request.

    chat: for tasks that are asked in a dialogue. batch_size: prompts
    that are continued together; scoring fills batches by tokens.

    Every stream begins as those of `scorer` do, with bos. Where they begin with nothing, a request
    without a context is scored after bos all the same. Contexts that are too long lose their
    beginning.
    """
    from lm_eval.api.model import TemplateLM

    tokenizer, progress = scorer.tokenizer, progress or Progress()
    limit = scorer.model.config.max_length

    class Model(TemplateLM):
        backend = "seq2seq" if scorer.takes_encoder else "causal"
        has_chat = chat is not None

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_id

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

        def loglikelihood(
            self, requests: list[Instance], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            pairs = []
            for context, continuation in (request.args for request in requests):  # pyright: ignore
                if context:
                    pairs.append(self._encode_pair(context, continuation))
                else:
                    pairs.append(self._after_nothing(self.tok_encode(continuation)))
            return self._score(pairs, disable_tqdm)

        def _after_nothing(self, ids: list[int]) -> tuple[list[int], list[int]]:
            if len(scorer.start) or scorer.takes_encoder:
                return [], ids
            prefix = tokenizer.bos_id
            return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)

        def _loglikelihood_tokens(  # pyright: ignore
            self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return self._score(pairs, disable_tqdm)

        def _score(
            self, pairs: Sequence[tuple[list[int], list[int]]], quiet: bool
        ) -> list[tuple[float, bool]]:
            contexts, continuations = zip(*pairs, strict=True) if pairs else ((), ())
            report = _reporter(progress, "scored", quiet)
            scores = scorer.score(contexts, continuations, report=report)
            return [(score.logprob, score.is_greedy) for score in scores]

        def loglikelihood_rolling(
            self, requests: list[Instance], disable_tqdm: bool = False
        ) -> list[float]:
            texts = [self.tok_encode(request.args[0]) for request in requests]
            if not len(scorer.start):
                texts = [
                    [tokenizer.bos_id, *ids] for ids in texts
                ]  # the tokens after it are scored
            report = _reporter(progress, "scored windows", disable_tqdm)
            return [score.logprob for score in scorer.rolling(texts, report=report)]

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
            report = _reporter(progress, "generated", disable_tqdm)
            groups: dict[tuple, list[int]] = {}
            for i, request in enumerate(requests):
                arguments: Any = request.args[1]  # pyright: ignore
                groups.setdefault(continue_by(arguments), []).append(i)
            texts, done = [""] * len(requests), 0
            for (count, sampling, until), members in groups.items():
                room = limit if scorer.takes_encoder else limit - count
                if room < 1:
                    raise ValueError(
                        f"a task asks for {count} tokens: config.model.max_length ({limit}) must "
                        "be larger"
                    )
                prompts = {i: self.tok_encode(requests[i].args[0])[-room:] for i in members}
                order = sorted(members, key=lambda i: -len(prompts[i]))
                for start in range(0, len(order), batch_size):
                    chosen = order[start : start + batch_size]
                    made = generator.generate(
                        [prompts[i] for i in chosen], max_new_tokens=count, sampling=sampling
                    )
                    for whole in made:
                        texts[chosen[whole.prompt]] = _before(whole.text, until)
                    done += len(chosen)
                    report(done, len(requests))
            return texts

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
    """(most new tokens, how to continue, stop strings) of the generation_kwargs of a task.

    Raises:
        ValueError: an argument is unknown.
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

    tasks: names, or YAML files. With files alone the harness's own tasks are not even looked up.

    Raises:
        ValueError: a task is neither.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    files = [task.endswith((".yaml", ".yml")) for task in tasks]
    for task, is_file in zip(tasks, files, strict=True):
        if is_file and not Path(task).is_file():
            raise ValueError(f"task {task}: no such file")
    manager = TaskManager(include_defaults=not all(files))
    unknown = [t for t, f in zip(tasks, files, strict=True) if not (f or manager.match_tasks([t]))]
    if unknown:
        raise ValueError(f"the harness has no task {', '.join(unknown)}")
    results = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=getattr(model, "has_chat", False),
        bootstrap_iters=1000,
    )
    assert results is not None, "of the first process"
    return dict(results)


def table(results: dict[str, Any]) -> str:
    """Metrics and their standard errors, a line each."""
    lines = []
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if metric == "alias" or metric.endswith("_stderr") or not isinstance(value, float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            after = f" ± {error:.4f}" if isinstance(error, float) else ""
            lines.append(f"{task}  {metric}  {value:.4f}{after}")
    return "\n".join(lines)
