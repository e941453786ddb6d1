"""The sections of a run's config as frozen dataclasses.

`lm.config.conversion` converts between a `Config` and the `ml_collections.ConfigDict` that configs
and the command line work on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lm.config.components import Evaluation
from lm.config.fields import field


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Initialization from another run or from word vectors.

    A parameter that is not stored, and a stored one that the model lacks, are errors unless `new`
    or `skip` lists them.
    """

    from_: str = field(
        "", "Run or import to restore the parameters from (flag: --config.init.from)."
    )
    step: int | None = field(None, "Checkpoint of that run; unset: the newest.", ge=0)
    branch_from: str = field(
        "",
        "Run to fork: this one continues from its whole state at `step`, as for cool-downs of a "
        "long run.",
    )
    new: tuple[str, ...] = field(
        (), "Patterns, such as head.*, of parameters to initialize randomly although stored."
    )
    skip: tuple[str, ...] = field((), "Patterns of stored parameters to ignore.")
    word_vectors: str = field(
        "",
        "Text file (.gz too) of GloVe or word2vec vectors to initialize embeddings of words with.",
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    tokenizer: str = field(
        "bytes", "bytes, a SentencePiece .model, or a Hugging Face tokenizer.json."
    )
    train: tuple[str, ...] = field((), "Token stores to train on, or synthetic:KIND.")
    weights: tuple[float, ...] = field(
        (), "Mixture weights of the stores; empty: by their size.", gt=0
    )
    validation: tuple[str, ...] = field(
        (), "Token stores to evaluate on, each reported separately."
    )
    length: int = field(1024, "Tokens in a row; with an encoder, in a row of the decoder.", ge=1)
    encoder_length: int | None = field(
        None, "Tokens in a row of the encoder; for models that have one beside a decoder.", ge=1
    )
    batch_size: int | None = field(None, "Rows in a global batch.", ge=1)
    batch_size_per_device: int | None = field(
        None, "Rows per device; an alternative to batch_size.", ge=1
    )
    packing: str = field(
        "split",
        "split: concatenate and cut; best_fit: whole documents only.",
        choices=("split", "best_fit"),
    )
    too_long: str = field(
        "error",
        "Documents of several fields that don't fit in a row: error; cut the first field at its "
        "end; drop them.",
        choices=("error", "cut", "drop"),
    )
    shuffle: bool = field(True, "Visit the rows of every epoch in a new random order.")


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """Loading of batches; nothing here changes their content."""

    kind: str = field(
        "tf.data", "tf.data, or thread (no TensorFlow needed).", choices=("tf.data", "thread")
    )
    num_workers: int = field(2, "Batches prepared in parallel.", ge=1)
    prefetch: int = field(4, "Batches kept ready.", ge=1)
    cache_dir: str = field("", "Where packing plans are kept; empty: beside each store.")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    z_loss: float = field(
        0.0, "Coefficient of log(Z)^2, which keeps logits near zero (PaLM: 1e-4).", ge=0
    )
    label_smoothing: float = field(
        0.0, "Probability mass spread evenly over the vocabulary.", ge=0, lt=1
    )
    chunk_size: int = field(
        2048, "Tokens whose logits exist at once on a device; 0: all of them.", ge=0
    )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    kind: str = field(
        "cosine",
        "constant, cosine, linear, inverse_sqrt, wsd, or range (see scripts/lr_range.py).",
        choices=("constant", "cosine", "linear", "inverse_sqrt", "wsd", "range"),
    )
    warmup_steps: int = field(0, "Steps of linear warm-up from zero.", ge=0)
    decay_steps: int | None = field(
        None, "wsd: steps of the final decay; unset: 20% of the run.", ge=0
    )
    final_fraction: float = field(
        0.1, "Learning rate at the end, as a fraction of its peak; range: at the start.", ge=0, le=1
    )


@dataclasses.dataclass(frozen=True)
class PruningConfig:
    """Pruning by magnitude; off without a sparsity or a pattern."""

    sparsity: float = field(
        0.0, "Share of the weights of each matrix to prune (arXiv:1710.01878).", ge=0, lt=1
    )
    pattern: str = field(
        "",
        "N:M, such as 2:4: prune all but the N largest of M consecutive inputs (arXiv:2104.08378); "
        "an alternative to sparsity.",
    )
    start_step: int = field(0, "First step that prunes.", ge=0)
    ramp_steps: int = field(
        0, "Steps from start_step over which the sparsity grows, by a cubic; 0: at once.", ge=0
    )
    every: int = field(100, "Steps between prunings, from start_step.", ge=1)
    parameters: tuple[str, ...] = field(
        ("*",), "Patterns of the matrices to prune, among the trained ones of linear maps."
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: str = field("adamw", "A module of lm.optim.optimizers, or a full module name.")
    learning_rate: float = field(3e-4, "Peak learning rate.", ge=0)
    schedule: ScheduleConfig = field(ScheduleConfig(), "The learning rate over the run.")
    weight_decay: float = field(0.1, "Decoupled decay, multiplied by the learning rate.", ge=0)
    decay_roles: tuple[str, ...] = field(
        ("matrix",),
        "Roles of parameters that decay: matrix, embedding, vector.",
        choices=("matrix", "embedding", "vector"),
    )
    decay_rule: str = field(
        "decoupled",
        "Weights that decay: all (decoupled), or those that their update brings nearer to zero "
        "(cautious, arXiv:2510.12402).",
        choices=("decoupled", "cautious"),
    )
    b1: float = field(0.9, "Decay of the first moment; the momentum of lion and sgd.", ge=0, lt=1)
    b2: float = field(0.95, "Decay of the second moment.", ge=0, lt=1)
    eps: float = field(1e-8, "Added to the root of the second moment.", gt=0)
    nesterov: bool = field(False, "Nesterov momentum (adamw, sgd; muon always uses it).")
    clip_norm: float = field(1.0, "Largest global norm of the gradient; 0: no clipping.", ge=0)
    muon_learning_rate: float | None = field(
        None, "muon: peak learning rate of the matrices; unset: learning_rate.", ge=0
    )
    muon_momentum: float = field(0.95, "muon: decay of the momentum of the matrices.", ge=0, lt=1)
    bias_rate: float = field(
        0.001, "Step of the selection biases of routers, against the load of their experts.", ge=0
    )
    ema_decay: float = field(
        0.0, "Decay of an average of the weights, used by evaluation; 0: none.", ge=0, lt=1
    )
    moment_dtype: str = field(
        "float32",
        "Type of stored moments: float32 or bfloat16.",
        choices=("float32", "bfloat16"),
    )
    memory: str = field(
        "device",
        "Memory of the state between steps: device or host.",
        choices=("device", "host"),
    )
    frozen: tuple[str, ...] = field(
        (), "Patterns, such as embedding.*, of frozen parameters: they keep every bit."
    )
    pruning: PruningConfig = field(PruningConfig(), "Pruning of matrices by magnitude.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = field(
        -1,
        "Replicas; -1, here or in one other axis: all remaining devices.",
        ge=1,
        also=(-1,),
    )
    fsdp: int = field(1, "Shards of parameters, optimizer state and batch.", ge=1, also=(-1,))
    expert: int = field(1, "Shards of experts.", ge=1, also=(-1,))
    tensor: int = field(1, "Shards of heads, MLP width and vocabulary.", ge=1, also=(-1,))
    sequence: int = field(1, "Shards of the sequence.", ge=1, also=(-1,))
    stage: int = field(1, "Pipeline stages.", ge=1, also=(-1,))
    slices: int = field(1, "Slices joined by a slow network, over which `data` is spread.", ge=1)
    zero: int = field(
        3,
        "ZeRO stage over fsdp: 3 shards parameters and optimizer state, 1 only the latter.",
        ge=3,
        le=3,
        also=(1,),
    )
    rules: tuple[tuple[str, Any], ...] = field(
        (), "Rows of the sharding table to replace: (logical axis, mesh axis, axes or None)."
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    num_steps: int | None = field(None, "Length of the run in optimizer steps.", ge=1, lt=2**31)
    num_tokens: int | None = field(
        None, "Length of the run in tokens; an alternative to num_steps.", ge=1
    )
    num_epochs: float | None = field(
        None, "Length of the run in epochs; an alternative to num_steps.", gt=0
    )
    max_epochs: float | None = field(
        None, "Epochs of its sources that a run may not go beyond; unset: any number.", gt=0
    )
    num_microbatches: int = field(1, "Parts of a batch whose gradients are accumulated.", ge=1)
    gradient_dtype: str = field(
        "compute",
        "Type in which devices add up the gradients of matrices: compute, that of model.dtype, or "
        "float32, at twice the bytes; all other sums are float32.",
        choices=("compute", "float32"),
    )
    eval_every: int = field(0, "Steps between evaluations; 0: at the end only.", ge=0)
    eval_batches: int = field(
        0, "Batches of each validation store per evaluation; 0: all of it.", ge=0
    )
    log_every: int = field(10, "Steps between log lines.", ge=1)
    compiler_flags: tuple[str, ...] = field(
        ("auto",),
        "XLA flags of the train step, NAME=VALUE; auto: those of docs/plan.md for the platform.",
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int = field(0, "Steps between checkpoints; 0: by time, and at the end.", ge=0)
    every_seconds: float = field(
        600.0, "Also save when this many seconds have passed; 0: never.", ge=0
    )
    keep_last: int = field(2, "Newest checkpoints to keep.", ge=1)
    keep_every: int = field(0, "Also keep every checkpoint at a multiple of this; 0: none.", ge=0)
    at: tuple[int, ...] = field((), "Steps to save at and to keep, to fork other runs from.", ge=0)
    allow_changed: tuple[str, ...] = field((), "Config paths that may differ from the saved run's.")
    memory_every: int = field(
        0,
        "Steps between snapshots in the memory of hosts, each with a copy at the next process; a "
        "restart on the same hosts goes on from them. 0: none.",
        ge=0,
    )
    memory_dir: str = field(
        "",
        "Folder in memory (tmpfs) for the snapshots; empty: /dev/shm/lm-UID, for this user only.",
    )
    verify: bool = field(True, "Check every bit after a save, from its files, and after a restore.")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    policy: str = field(
        "stop",
        "At a loss or gradient that is not finite, or a spike: stop, skip the update, or rewind "
        "to the last checkpoint, replay the step and report the cause (on GPUs without "
        "xla_gpu_deterministic_ops=true in train.compiler_flags: whether it is bad again).",
        choices=("stop", "skip", "rewind"),
    )
    spike_factor: float = field(
        0.0,
        "A gradient norm this many times its running geometric mean is a spike; 0: none is.",
        gt=1,
        also=(0,),
    )
    spike_warmup: int = field(100, "First steps of the mean, none of which is a spike.", ge=0)
    max_skips: int = field(
        10,
        "Bad steps, or disagreements of replicas, in a row after which every policy stops.",
        ge=0,
    )
    agreement_every: int = field(
        100, "Steps between checks that replicas hold the same bits; 0: none.", ge=0
    )
    self_check: bool = field(
        True, "Check attention, experts and loss against a reference at the start."
    )
    watchdog: bool = field(True, "End a process that makes no progress, with all stacks written.")
    step_attempts: int = field(
        3, "Attempts in a row that fail at one step, after which the run stops; 0: any.", ge=0
    )
    max_attempts: int = field(
        20,
        "Attempts in a row without a new checkpoint, after which the run stops; each waits for "
        "longer, up to 300 s. 0: any, without waiting.",
        ge=0,
    )
    start_seconds: float = field(1800.0, "Budget of start, initialisation and restoring.", gt=0)
    compile_seconds: float = field(3600.0, "Budget of compiling, and of the first step.", gt=0)
    step_seconds: float = field(120.0, "Smallest budget of a step.", gt=0)
    step_factor: float = field(
        20.0, "Budget of a step, in running medians of the steps before.", ge=1
    )
    data_seconds: float = field(900.0, "Budget of waiting for one batch.", gt=0)
    save_seconds: float = field(1800.0, "Budget of what blocks in a save.", gt=0)
    evaluate_seconds: float = field(900.0, "Budget of one batch of an evaluation.", gt=0)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    trackers: tuple[str, ...] = field(
        ("jsonl", "tensorboard"),
        "Where the records of metrics go: jsonl is metrics.jsonl, which every run has.",
        choices=("jsonl", "tensorboard", "wandb", "mlflow"),
    )
    tracker_project: str = field("lm", "The project (wandb) or experiment (mlflow) of the run.")
    tracker_tags: tuple[str, ...] = field((), "Tags of the run at wandb and mlflow.")
    tracker_notes: str = field("", "Description of the run at wandb and mlflow.")
    parameter_table: bool = field(True, "Print the table of parameters at the start.")
    noise_scale: bool = field(
        False,
        "Measure the gradient noise scale, in tokens, from the gradients of micro-batches "
        "(arXiv:1812.06162).",
    )
    layers_every: int = field(
        0,
        "Steps between statistics of layers, into WORKDIR/layers.jsonl; 0: none. At 50 they take "
        "under 1% of the time, if devices have at least four rows each.",
        ge=0,
    )
    profile_start: int = field(0, "First step of the profiler's window.", ge=0)
    profile_steps: int = field(0, "Steps to profile into WORKDIR/profile; 0: none.", ge=0)
    peak_flops_per_device: float | None = field(
        None, "FLOP/s of one device, for MFU; unset: from the table of known chips.", gt=0
    )
    watts_per_device: float | None = field(
        None,
        "Power of one device, for energy where no counter is read; unset: from the table of known "
        "chips.",
        gt=0,
    )
    grid_gco2e_per_kwh: float | None = field(
        None, "Carbon intensity of the grid, for emissions; unset: energy alone.", ge=0
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """An evaluation inside a run: the fields that all have beside those of their component."""

    every: int = field(0, "Steps between evaluations; 0: after the last step only.", ge=0)
    seconds: float = field(
        0.0,
        "Time of one evaluation, without compiling; after the batch in which it is over, what is "
        "done counts as a partial result. 0: any.",
        ge=0,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run."""

    seed: int = field(
        0, "Seed of initialisation, dropout and the order of the data.", ge=0, lt=2**32
    )
    model: Any = field(None, "The model: name, and the fields of that component.")
    objective: Any = field(None, "The objective: name, and the fields of that component.")
    init: InitConfig = field(InitConfig(), "Initialization of the parameters.")
    data: DataConfig = field(DataConfig(), "Token stores, tokenizer and batches.")
    loader: LoaderConfig = field(LoaderConfig(), "Loading of batches.")
    loss: LossConfig = field(LossConfig(), "The token loss.")
    optimizer: OptimizerConfig = field(OptimizerConfig(), "The update rule.")
    mesh: MeshConfig = field(
        MeshConfig(), "The device mesh; the product of its axes is the number of devices."
    )
    train: TrainConfig = field(TrainConfig(), "Length of the run, evaluation and logging.")
    checkpoint: CheckpointConfig = field(CheckpointConfig(), "Saving and retention of checkpoints.")
    guard: GuardConfig = field(GuardConfig(), "Bad steps, hangs and checks.")
    log: LogConfig = field(LogConfig(), "Logs, metrics and profiles.")
    evaluations: dict[str, Evaluation] = field(
        {}, "Evaluations inside the run, beside those of data.validation, by names of your own."
    )
