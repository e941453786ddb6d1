"""Train the model of a config in a folder, or resume its training.

    python scripts/train.py --config=configs/tiny.py --workdir=runs/tiny
    python scripts/train.py --config=configs/gpt2.py:124m --workdir=runs/gpt2 \\
        --config.data.train="('data/web/train',)" --config.optimizer.learning_rate=1e-3

Every value of the config can be given as --config.SECTION.KEY=VALUE; --explain lists them all. The
folder, local, gs:// or s3://, gets the files that README.md lists. The same command, run again,
resumes from the last checkpoint.

On several machines start it once on each: SLURM, Kubernetes and Cloud TPUs are recognized (see
scripts/launch), elsewhere say --coordinator=HOST:PORT --num-processes=N --process-id=I.
"""

from __future__ import annotations

from lm import cli
from lm.parallel import process_group


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_config()
    add = parser.add_argument
    add("--workdir", type=cli.folder, help="folder of the run; made if it doesn't exist")
    add("--explain", action="store_true", help="print every config key, its default and meaning")
    process_group.add_flags(parser)
    args = parser.parse_args()
    if args.explain:
        from lm.config.conversion import explain

        for path, value, default, sentence in explain(args.config):
            note = "" if value == default else f"  (default {default!r})"
            print(f"--config.{path}={value!r}{note}\n      {sentence}")
        return 0
    if args.workdir is None:
        parser.error("--workdir=FOLDER is needed")

    process_group.initialize_from(args)
    import jax

    from lm.exit_codes import Exit, RunError
    from lm.parallel import device_errors
    from lm.run_page import page
    from lm.telemetry.goodput import process_start
    from lm.training.loop import train

    is_lead = jax.process_index() == 0
    try:
        code = train(args.config, args.workdir, jax.devices(), began=process_start())
        if is_lead:
            page.write_at_end(args.workdir, code)
        return code
    except RunError as error:
        if is_lead:
            page.write_at_end(args.workdir, error.code)
        raise
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if device_errors.exit_code(error) == Exit.OUT_OF_MEMORY:
            from lm.planning import out_of_memory

            flags = [f"--config={args.config_name}", *(f"--config.{s}" for s in args.settings)]
            error.add_note(out_of_memory.advice(args.config, jax.devices(), flags))
        raise


if __name__ == "__main__":
    cli.run(main)
