"""The table of contents of a run: frozen dataclasses, and their way to and from
`ml_collections.ConfigDict`.

`configs/*.py` and the command line work on a ConfigDict; `resolve` turns it into the frozen
`Config` that the code reads. Model and objective are components: modules with a `Config` dataclass
and a `build` function, found by the name in `config.model.name` and `config.objective.name` (a name
with a dot is imported as it is, so that a component may live outside of this project).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

import ml_collections
from ml_collections import config_dict


def field(default: Any, sentence: str) -> Any:
    """A dataclass field with its default and the sentence that `--explain` prints."""
    if dataclasses.is_dataclass(default):
        kind = type(default)
        return dataclasses.field(default_factory=lambda: kind(), metadata={"help": sentence})
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata={"help": sentence})
    return dataclasses.field(default=default, metadata={"help": sentence})


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """What a run begins with, where not with random parameters. `new` and `skip` are exact: a
    parameter without a source and a stored one without a place are errors unless listed here.
    """

    from_: str = field(
        "", "Run or import whose parameters this one begins with (a flag --config.init.from)."
    )
    step: int | None = field(None, "Checkpoint of that run; unset: the newest.")
    branch_from: str = field(
        "",
        "Run whose whole state at `step` this one goes on from, as if it had made those steps "
        "itself: for cool-downs of a long run.",
    )
    new: tuple[str, ...] = field(
        (), "Patterns, such as head.*, of parameters that begin at random all the same."
    )
    skip: tuple[str, ...] = field((), "Patterns of stored parameters that are left out.")
    word_vectors: str = field(
        "", "Text file (.gz too) of GloVe or word2vec vectors that embeddings of words begin with."
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    tokenizer: str = field(
        "bytes", "bytes, a SentencePiece .model, or a Hugging Face tokenizer.json."
    )
    train: tuple[str, ...] = field((), "Token stores to train on, or synthetic:KIND.")
    weights: tuple[float, ...] = field((), "Mixture weights of the stores; empty: by their size.")
    validation: tuple[str, ...] = field(
        (), "Token stores to evaluate on, each reported separately."
    )
    length: int = field(1024, "Tokens in a row; with an encoder, in a row of the decoder.")
    encoder_length: int | None = field(
        None, "Tokens in a row of the encoder; for models that have one beside a decoder."
    )
    batch_size: int | None = field(None, "Rows in a global batch.")
    batch_size_per_device: int | None = field(
        None, "Rows per device; an alternative to batch_size."
    )
    packing: str = field("split", "split: concatenate and cut; best_fit: whole documents only.")
    too_long: str = field(
        "error",
        "Documents of several fields that don't fit in a row: error; cut the first field at its "
        "end; drop them.",
    )
    shuffle: bool = field(True, "Visit the rows of every epoch in a new random order.")


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """How batches reach the device; nothing here changes what is in them."""

    kind: str = field("tf.data", "tf.data, or thread (no TensorFlow needed).")
    num_workers: int = field(2, "Batches prepared in parallel.")
    prefetch: int = field(4, "Batches kept ready.")
    cache_dir: str = field("", "Where packing plans are kept; empty: beside each store.")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    z_loss: float = field(
        0.0, "Coefficient of log(Z)^2, which keeps logits near zero (PaLM: 1e-4)."
    )
    label_smoothing: float = field(0.0, "Probability mass spread evenly over the vocabulary.")
    chunk_size: int = field(2048, "Tokens whose logits exist at once on a device; 0: all of them.")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    kind: str = field(
        "cosine", "constant, cosine, linear, inverse_sqrt, wsd, or range (see scripts/lr_range.py)."
    )
    warmup_steps: int = field(0, "Steps of linear warm-up from zero.")
    decay_steps: int | None = field(None, "wsd: steps of the final decay; unset: 20% of the run.")
    final_fraction: float = field(
        0.1, "Learning rate at the end, as a fraction of its peak; range: at the start."
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = field("adamw", "adamw, adafactor, lion, muon or sgd.")
    learning_rate: float = field(3e-4, "Peak learning rate.")
    schedule: ScheduleConfig = field(
        ScheduleConfig(), "How the learning rate changes over the run."
    )
    weight_decay: float = field(0.1, "Decoupled decay, multiplied by the learning rate.")
    decay_roles: tuple[str, ...] = field(
        ("matrix",), "Roles of parameters that decay: matrix, embedding, vector."
    )
    b1: float = field(0.9, "Decay of the first moment; the momentum of lion and sgd.")
    b2: float = field(0.95, "Decay of the second moment.")
    eps: float = field(1e-8, "Added to the root of the second moment.")
    nesterov: bool = field(False, "Nesterov momentum (adamw, sgd; muon always uses it).")
    clip_norm: float = field(1.0, "Largest global norm of the gradient; 0: no clipping.")
    muon_learning_rate: float | None = field(
        None, "muon: peak learning rate of the matrices; unset: learning_rate."
    )
    muon_momentum: float = field(0.95, "muon: decay of the momentum of the matrices.")
    bias_rate: float = field(
        0.001, "Step of the selection biases of routers, against the load of their experts."
    )
    ema_decay: float = field(
        0.0, "Decay of an average of the weights, used by evaluation; 0: none."
    )
    moment_dtype: str = field("float32", "Type of stored moments: float32 or bfloat16.")
    memory: str = field("device", "Where the state lies between steps: device or host.")
    frozen: tuple[str, ...] = field(
        (), "Patterns, such as embedding.*, of parameters that keep every bit."
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = field(-1, "Replicas; -1: all devices that the other axes leave.")
    fsdp: int = field(1, "Shards of parameters, optimizer state and batch.")
    expert: int = field(1, "Shards of experts.")
    tensor: int = field(1, "Shards of heads, MLP width and vocabulary.")
    sequence: int = field(1, "Shards of the sequence.")
    stage: int = field(1, "Pipeline stages.")
    slices: int = field(1, "Slices joined by a slow network, over which `data` is spread.")
    zero: int = field(
        3, "ZeRO stage over fsdp: 3 shards parameters and optimizer state, 1 the latter alone."
    )
    rules: tuple[tuple[str, Any], ...] = field(
        (), "Rows of the sharding table to replace: (logical axis, mesh axis, axes or None)."
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int | None = field(None, "Length of the run in optimizer steps.")
    num_tokens: int | None = field(
        None, "Length of the run in tokens; an alternative to num_steps."
    )
    num_epochs: float | None = field(
        None, "Length of the run in epochs; an alternative to num_steps."
    )
    max_epochs: float | None = field(
        None, "Epochs of its sources that a run may not go beyond; unset: any number."
    )
    num_microbatches: int = field(1, "Parts of a batch whose gradients are accumulated.")
    eval_every: int = field(0, "Steps between evaluations; 0: at the end only.")
    eval_batches: int = field(0, "Batches of each validation store per evaluation; 0: all of it.")
    log_every: int = field(10, "Steps between log lines.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = field(0, "Steps between checkpoints; 0: at the end only.")
    every_seconds: float = field(0.0, "Also save when this many seconds have passed; 0: never.")
    keep_last: int = field(2, "Newest checkpoints to keep.")
    keep_every: int = field(0, "Also keep every checkpoint at a multiple of this; 0: none.")
    at: tuple[int, ...] = field((), "Steps to save at and to keep, where other runs branch off.")
    allow_changed: tuple[str, ...] = field((), "Config paths that may differ from the saved run's.")
    verify: bool = field(True, "Check every bit after a save, from its files, and after a restore.")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    policy: str = field(
        "stop",
        "At a loss or gradient that is not finite, or a spike: stop, skip the update, or rewind "
        "to the last checkpoint, replay the step and say whose fault it was.",
    )
    spike_factor: float = field(
        0.0, "A gradient norm this many times its running geometric mean is a spike; 0: none is."
    )
    spike_warmup: int = field(100, "Steps that the running mean needs before it judges.")
    max_skips: int = field(10, "Bad steps in a row after which every policy stops.")
    agreement_every: int = field(
        100, "Steps between checks that replicas hold the same bits; 0: none."
    )
    self_check: bool = field(True, "Check attention and loss against a reference at the start.")
    watchdog: bool = field(True, "End a process that makes no progress, with all stacks written.")
    start_seconds: float = field(1800.0, "Budget of start, initialisation and restoring.")
    compile_seconds: float = field(3600.0, "Budget of compiling, and of the first step.")
    step_seconds: float = field(120.0, "Least budget of a step.")
    step_factor: float = field(20.0, "Budget of a step, in running medians of the steps before.")
    data_seconds: float = field(900.0, "Budget of waiting for one batch.")
    save_seconds: float = field(1800.0, "Budget of what blocks in a save.")
    evaluate_seconds: float = field(900.0, "Budget of one batch of an evaluation.")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = field(True, "Write TensorBoard event files beside metrics.jsonl.")
    parameter_table: bool = field(True, "Print the table of parameters at the start.")
    noise_scale: bool = field(
        False,
        "Measure the gradient noise scale, in tokens, from the gradients of micro-batches "
        "(arXiv:1812.06162).",
    )
    profile_start: int = field(0, "First step of the profiler's window.")
    profile_steps: int = field(0, "Steps to profile into WORKDIR/profile; 0: none.")
    peak_flops_per_device: float | None = field(
        None, "FLOP/s of one device, for MFU; unset: from the table of known chips."
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    seed: int = field(0, "Seed of initialisation, dropout and the order of the data.")
    model: Any = field(None, "The model: name, and the fields of that component.")
    objective: Any = field(None, "The objective: name, and the fields of that component.")
    init: InitConfig = field(InitConfig(), "What parameters begin with.")
    data: DataConfig = field(DataConfig(), "Where rows come from.")
    loader: LoaderConfig = field(LoaderConfig(), "How batches reach the device.")
    loss: LossConfig = field(LossConfig(), "The token loss.")
    optimizer: OptimizerConfig = field(OptimizerConfig(), "The update rule.")
    mesh: MeshConfig = field(MeshConfig(), "How devices are arranged; the product is their number.")
    train: TrainConfig = field(TrainConfig(), "Length and rhythm of the run.")
    checkpoint: CheckpointConfig = field(CheckpointConfig(), "When to save and what to keep.")
    guard: GuardConfig = field(GuardConfig(), "What to do when something goes wrong.")
    log: LogConfig = field(LogConfig(), "What is written and printed.")


COMPONENTS = {"model": "lm.models", "objective": "lm.objectives"}


@dataclasses.dataclass(frozen=True)
class Task:
    """One of several objectives that a run has at once: its name, config, and stores."""

    name: str
    sources: tuple[str, ...]
    config: Any


def task(name: str, sources: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    """A section of `config.objective.tasks`: an objective, its fields at their defaults or
    `changes`, and the stores that it is for.
    """
    fields = _to_dict(component(COMPONENTS["objective"], name).Config)
    _check_keys(changes, set(fields), f"task {name}")
    return {"name": name, "sources": sources} | fields | changes


def component(package: str, name: str) -> types.ModuleType:
    """The module that `name` means inside `package`; with a dot in it, the module of that full
    name.

    Raises:
        ValueError: no such module, or it has no `Config` and `build`; the message lists those that
        exist.
    """
    path = name if "." in name else f"{package}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # the module exists, and something that it needs does not
        import pkgutil

        home = importlib.import_module(package)
        known = sorted(m.name for m in pkgutil.iter_modules(home.__path__))
        raise ValueError(f"{name!r} is not in {package}; there are: {', '.join(known)}") from None
    for needed in ("Config", "build"):
        if not hasattr(module, needed):
            raise ValueError(f"{path} is no component: it has no `{needed}`")
    return module


def default(model: str = "decoder", objective: str = "causal") -> ml_collections.ConfigDict:
    """A ConfigDict with every field of every section at its default, for configs to change."""
    tree: dict[str, Any] = {}
    for f in dataclasses.fields(Config):
        if f.name in COMPONENTS:
            name = {"model": model, "objective": objective}[f.name]
            section = {"name": name} | _to_dict(component(COMPONENTS[f.name], name).Config)
        else:
            section = _to_dict(_hints(Config)[f.name]) if f.name != "seed" else f.default
        tree[f.name] = section
    return ml_collections.ConfigDict(tree)


def resolve(config: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """The frozen `Config` of a ConfigDict (or of the plain dict that `to_dict` made of one).

    Raises:
        ValueError: a key that nothing reads, a missing section, or a value of the wrong type; with
        the config path.
    """
    tree = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    _check_keys(tree, {f.name for f in dataclasses.fields(Config)}, "config")
    values: dict[str, Any] = {}
    for f in dataclasses.fields(Config):
        path, section = f"config.{f.name}", tree.get(f.name, {})
        if f.name in COMPONENTS:
            section = dict(section)
            name = section.pop("name", None)
            if not isinstance(name, str):
                raise ValueError(
                    f"{path}.name must name a component of {COMPONENTS[f.name]}, got {name!r}"
                )
            values[f.name] = _from_dict(component(COMPONENTS[f.name], name).Config, section, path)
        elif f.name == "seed":
            values[f.name] = _convert(int, tree.get("seed", f.default), path)
        else:
            values[f.name] = _from_dict(_hints(Config)[f.name], section, path)
    return Config(**values)


def names(config: ml_collections.ConfigDict) -> dict[str, str]:
    """The component names of a config: {"model": "decoder", "objective": "causal"}."""
    return {key: config[key]["name"] for key in COMPONENTS}  # pyright: ignore


def to_json(config: ml_collections.ConfigDict) -> str:
    """The config as JSON text; `from_json` reads it back to an equal one."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str) -> ml_collections.ConfigDict:
    """The ConfigDict that `to_json` wrote; fields added since get their defaults."""
    tree = json.loads(text)
    config = default(**{key: tree[key]["name"] for key in COMPONENTS})
    _check_keys(tree, set(config.keys()), "config")
    if "tasks" in config.objective:
        of = tree["objective"].get("tasks", {})
        config.objective.tasks = {name: task(t["name"], ()) for name, t in of.items()}
    for path, value in _leaves(tree):
        *sections, last = path.split(".")
        node: Any = config
        for key in sections:
            node = node[key]
        _check_keys({last: value}, set(node.keys()), ".".join(["config", *sections]))
        with node.ignore_type():
            node[last] = _tuples(value)
    return config


def assign(config: ml_collections.ConfigDict, setting: str) -> None:
    """Sets a value from text such as "optimizer.learning_rate=1e-3", as a flag --config.… would.

    Raises:
        ValueError: no such key, or a value of another type.
    """
    path, equals, text = setting.partition("=")
    if not equals:
        raise ValueError(f"{setting!r} is not KEY=VALUE")
    path = path.removeprefix("config.")
    *sections, last = path.split(".")
    node: Any = config
    for depth, key in enumerate([*sections, last]):
        if not isinstance(node, ml_collections.ConfigDict):
            raise ValueError(f"config.{'.'.join(sections[:depth])} is a value and has no keys")
        _check_keys({key: None}, set(node.keys()), ".".join(["config", *sections[:depth]]))
        node = node[key] if depth < len(sections) else node
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    if isinstance(node[last], str):
        value = text
    try:
        node[last] = _tuples(value)
    except TypeError:
        kind = type(node[last]).__name__
        raise ValueError(f"config.{path} must be {kind}, got {text!r}") from None


def changed(
    old: ml_collections.ConfigDict, new: ml_collections.ConfigDict
) -> dict[str, tuple[Any, Any]]:
    """Paths whose values differ, with both values."""
    a, b = dict(_leaves(old.to_dict())), dict(_leaves(new.to_dict()))
    return {
        path: (a.get(path), b.get(path))
        for path in sorted(a.keys() | b.keys())
        if _tuples(a.get(path)) != _tuples(b.get(path))
    }


def explain(config: ml_collections.ConfigDict) -> Iterator[tuple[str, Any, Any, str]]:
    """(path, value, default, sentence) of every key."""
    base = default(**names(config))
    defaults = dict(_leaves(base.to_dict()))
    sentences = {"seed": _sentence(Config, "seed")}
    for f in dataclasses.fields(Config):
        if f.name in COMPONENTS:
            package = COMPONENTS[f.name]
            cls = component(package, names(config)[f.name]).Config
            sentences[f"{f.name}.name"] = f"A module of {package}, or a full module name."
        else:
            cls = _hints(Config)[f.name]
        if dataclasses.is_dataclass(cls):
            sentences |= dict(_sentences(cls, f.name))
    for path, value in _leaves(config.to_dict()):
        yield path, value, defaults.get(path), sentences.get(path, "")


def _sentence(cls: Any, name: str) -> str:
    return next(f.metadata["help"] for f in dataclasses.fields(cls) if f.name == name)


def _sentences(cls: Any, prefix: str) -> Iterator[tuple[str, str]]:
    hints = _hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _sentences(hints[f.name], f"{prefix}.{f.name}")
        else:
            yield f"{prefix}.{f.name}", f.metadata["help"]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


@functools.cache  # a search resolves thousands of configs, and this is most of the time it takes
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _optional(hint: Any) -> tuple[Any, bool]:
    """(X, True) for `X | None`, else (hint, False)."""
    args = typing.get_args(hint)
    if isinstance(hint, types.UnionType) and type(None) in args:
        return next(a for a in args if a is not type(None)), True
    return hint, False


def _to_dict(cls: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        hint, optional = _optional(_hints(cls)[f.name])
        if dataclasses.is_dataclass(hint):
            tree[f.name] = _to_dict(hint)
        elif optional and f.default is None:
            tree[f.name] = config_dict.placeholder(hint)  # else the command line could not set it
        elif typing.get_origin(hint) is dict:
            tree[f.name] = {}
        else:
            tree[f.name] = f.default
    return tree


def _check_keys(tree: dict[str, Any], known: set[str], path: str) -> None:
    for key in tree:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = (
                f"; did you mean {path}.{close[0]}?"
                if close
                else f"; known: {', '.join(sorted(known))}"
            )
            raise ValueError(f"{path}.{key} is not a config key{hint}")


def _from_dict(cls: Any, tree: dict[str, Any], path: str) -> Any:
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must be a section with keys, got {tree!r}")
    hints = _hints(cls)
    _check_keys(tree, set(hints), path)
    values = {}
    for key, value in tree.items():
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _from_dict(hints[key], value, f"{path}.{key}")
        else:
            values[key] = _convert(hints[key], value, f"{path}.{key}")
    return cls(**values)


def _to_task(section: Any, path: str) -> Task:
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise ValueError(f"{path} must be a section with the name of an objective, got {section!r}")
    fields = {key: value for key, value in section.items() if key not in ("name", "sources")}
    sources = _convert(tuple[str, ...], section.get("sources", ()), f"{path}.sources")
    config = component(COMPONENTS["objective"], section["name"]).Config
    return Task(section["name"], sources, _from_dict(config, fields, path))


def _convert(hint: Any, value: Any, path: str) -> Any:
    kind, optional = _optional(hint)
    if optional and value is None:
        return None
    origin = typing.get_origin(kind) or kind
    if kind == dict[str, Task]:
        return {name: _to_task(section, f"{path}.{name}") for name, section in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        hints = typing.get_args(kind)
        if hints[-1] is ...:
            hints = hints[:1] * len(value)
        if len(hints) != len(value):
            raise ValueError(f"{path} must have {len(hints)} entries, got {value!r}")
        pairs = enumerate(zip(hints, value, strict=True))
        return tuple(_convert(hint, v, f"{path}[{i}]") for i, (hint, v) in pairs)
    if kind is Any:
        return _tuples(value)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, origin) or (isinstance(value, bool) and origin is not bool):
        raise ValueError(f"{path} must be {getattr(kind, '__name__', kind)}, got {value!r}")
    return value
