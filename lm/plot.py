"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping

from etils import epath

from lm import metrics


def loss_curve(workdir: str, references: Mapping[str, float] | None = None) -> str:
    """Draws WORKDIR/loss.png from metrics.jsonl and returns its path.

    Left: training and validation loss in nats per token; right, where it is known: bits per byte of
    validation. `references` are named horizontal lines in bits per byte, such as what gzip needs.

    Raises:
        ValueError: the run has written no metrics yet.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = metrics.read(workdir)
    train = [r for r in records if r["kind"] == "train"]
    evals = [r for r in records if r["kind"] == "eval"]
    if not train:
        raise ValueError(f"{workdir} has no metrics to draw yet")
    tokens, seen = [], 0.0
    at = {}
    for r in train:
        seen += r["tokens"]
        tokens.append(seen / 1e6)
        at[r["step"]] = seen / 1e6
    sources = sorted({r["source"] for r in evals})
    with_bytes = any("bits_per_byte" in r for r in evals)
    figure, axes = plt.subplots(1, 1 + with_bytes, figsize=(6 * (1 + with_bytes), 4), squeeze=False)
    left = axes[0][0]
    left.plot(tokens, [r["loss"] for r in train], color="0.6", linewidth=1, label="training")
    for axis, key in zip(axes[0], ("loss", "bits_per_byte"), strict=False):
        for source in sources:
            mine = [r for r in evals if r["source"] == source and key in r and r["step"] in at]
            x, y = [at[r["step"]] for r in mine], [r[key] for r in mine]
            name = epath.Path(source).name
            axis.plot(x, y, marker="o", markersize=4, label=name)
            if y:
                axis.annotate(
                    f"{y[-1]:.3f}", (x[-1], y[-1]), (0, 8), textcoords="offset points", ha="right"
                )
        axis.set_xlabel("tokens trained on (millions)")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("loss (nats per token)")
    values = sorted(r["loss"] for r in [*train, *evals])
    left.set_ylim(values[0] * 0.95, values[int(0.97 * (len(values) - 1))] * 1.05)
    left.legend(frameon=False)
    if with_bytes:
        right = axes[0][1]
        right.set_ylabel("bits per byte, held out")
        for i, (name, value) in enumerate((references or {}).items()):
            right.axhline(value, color=f"C{i + 2}", linestyle="--", label=f"{name} {value:.3f}")
        top = [r["bits_per_byte"] for r in evals if "bits_per_byte" in r]
        low = min([*top, *(references or {}).values()])
        right.set_ylim(low * 0.93, max([min(top) * 1.6, *(references or {}).values()]) * 1.05)
        right.legend(frameon=False)
    figure.suptitle(epath.Path(workdir).resolve().name)
    figure.tight_layout()
    path = epath.Path(workdir) / "loss.png"
    figure.savefig(str(path), dpi=120)
    plt.close(figure)
    return str(path)


def range_curve(workdir: str, smoothing: float = 0.9) -> tuple[str, float]:
    """Draws WORKDIR/lr_range.png, the loss against the learning rate of a run whose schedule is
    `range`, and returns its path and the rate at which the smoothed loss is lowest.

    smoothing: decay of the running mean over records, without the bias of its start.

    Raises:
        ValueError: the run has written too few metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in metrics.read(workdir) if r["kind"] == "train" and "loss" in r]
    if len(records) < 2:
        raise ValueError(f"{workdir} has {len(records)} records of training: nothing to draw")
    rates, losses = [r["learning_rate"] for r in records], [r["loss"] for r in records]
    mean, smooth = 0.0, []
    for i, loss in enumerate(losses):
        mean = smoothing * mean + (1 - smoothing) * loss
        smooth.append(mean / (1 - smoothing ** (i + 1)))
    low = min(range(len(smooth)), key=lambda i: smooth[i])
    figure, axis = plt.subplots(figsize=(6, 4))
    axis.plot(rates, losses, color="0.7", linewidth=1, label="each record")
    axis.plot(rates, smooth, label="running mean")
    axis.scatter([rates[low]], [smooth[low]], marker="*", s=90, zorder=3, color="C1")
    axis.annotate(
        f"lowest at {rates[low]:.2g}",
        (rates[low], smooth[low]),
        (0, -14),
        textcoords="offset points",
        ha="center",
    )
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("loss (nats per token)")
    span = smooth[0] - smooth[low]
    axis.set_ylim(smooth[low] - 0.25 * span, smooth[0] + 0.5 * span)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.suptitle(epath.Path(workdir).resolve().name)
    figure.tight_layout()
    path = epath.Path(workdir) / "lr_range.png"
    figure.savefig(str(path), dpi=120)
    plt.close(figure)
    return str(path), rates[low]
