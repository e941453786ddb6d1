"""A learning-rate range test (arXiv:1506.01186): a short run whose rate grows until the loss does.

    python scripts/lr_range.py --config=configs/tiny.py --workdir=runs/range --steps=200 \\
        --least=1e-5 --most=1

Trains as scripts/train.py does, with the rate growing by equal ratios, and draws
WORKDIR/lr_range.png. Good rates for training are some factor below where the loss is lowest; the
test says where to look, not what is best. A run that diverges has shown what it was for.
"""

from __future__ import annotations

from lm import cli


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_config()
    add = parser.add_argument
    add("--workdir", type=cli.folder, required=True, help="folder of the run; made if not there")
    add("--steps", type=int, default=200, help="steps of the test, at least 10")
    add("--least", type=float, default=1e-5, help="learning rate of the first step")
    add("--most", type=float, default=1.0, help="learning rate of the last step")
    args = parser.parse_args()
    if not 0 < args.least < args.most:
        parser.error(f"--least={args.least} must be between 0 and --most={args.most}")
    if args.steps < 10:
        parser.error(f"--steps={args.steps} must be at least 10")
    import jax

    from lm.telemetry import loss_curve
    from lm.training.loop import train
    from lm.training.session import Diverged

    config, old = args.config, args.config.optimizer
    changes = {
        "optimizer.learning_rate": args.most,
        "optimizer.schedule.kind": "range",
        "optimizer.schedule.warmup_steps": 0,
        "optimizer.schedule.final_fraction": args.least / args.most,
        "train.num_steps": args.steps,
        "train.log_every": 1,
        "data.validation": (),
    }
    if old.muon_learning_rate is not None:  # keeps its ratio
        ratio = old.muon_learning_rate / old.learning_rate
        changes["optimizer.muon_learning_rate"] = ratio * args.most
    config.update_from_flattened_dict(changes)
    try:
        train(config, args.workdir, jax.devices())
    except Diverged as error:
        print(f"ended early: {error}")
    path, rate = loss_curve.range_curve(args.workdir)
    print(f"the loss is lowest at a learning rate of {rate:.3g}: {path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
