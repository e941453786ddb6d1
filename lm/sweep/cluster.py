"""The runs of a sweep as commands for a cluster, through the scripts in scripts/launch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from lm.sweep.pool import Run

SLURM = "scripts/launch/slurm.sbatch"
TPU_VM = "scripts/launch/tpu_vm.sh"

_ARRAY = """\
#!/bin/bash
# {count} runs, at most {slots} at a time: task i does line i + 1 of commands.txt. Submit it in the
# folder of the repository, with options of sbatch as the cluster needs them:
#
#     sbatch --nodes=1 --gpus-per-node=8 {path}
#SBATCH --array=0-{last}%{slots}
{options}
set -u
line=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {commands})
eval "set -- $line"
exec bash {script} "$@"
"""


def write_slurm(root: Path, runs: Sequence[Run], slots: int) -> Path:
    """Writes ROOT/commands.txt, the flags of a run in each line, and ROOT/array.sbatch, a job array
    of `scripts/launch/slurm.sbatch`, whose path it returns.
    """
    root.mkdir(parents=True, exist_ok=True)
    commands, path = root / "commands.txt", root / "array.sbatch"
    commands.write_text("".join(shlex.join(_flags(root, run)) + "\n" for run in runs))
    script = Path(__file__).parents[2] / SLURM
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    lines = [line.replace("%x-%j.log", f"{root}/%x-%A_%a.log") for line in lines]
    path.write_text(
        _ARRAY.format(
            count=len(runs),
            last=len(runs) - 1,
            slots=slots,
            path=path,
            options="\n".join(lines),
            commands=shlex.quote(str(commands)),
            script=SLURM,
        )
    )
    path.chmod(path.stat().st_mode | 0o111)
    return path


def write_tpu_vm(root: Path, runs: Sequence[Run], slots: int) -> Path:
    """Writes ROOT/tpu_vm.sh, which trains the runs one after the other on `slots` queued resources,
    NAME-0 and so on, and returns its path.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / "tpu_vm.sh"
    lines = [
        "#!/bin/bash",
        f"# {len(runs)} runs on {slots} queued resources, made and deleted for each run. In the",
        f"# folder of the repository:  NAME=sweep ZONE=… TYPE=… {path}",
        ': "${NAME:?name of the queued resources}" "${ZONE:?zone}" "${TYPE:?accelerator type}"',
        "name=$NAME; export NAME ZONE TYPE",
    ]
    for slot in range(min(slots, len(runs))):
        lines.append(f"( export NAME=$name-{slot}")
        for run in runs[slot::slots]:
            lines.append(f"  {TPU_VM} train {shlex.join(_flags(root, run))}")
        lines.append(") &")
    path.write_text("\n".join([*lines, "wait", ""]))
    path.chmod(path.stat().st_mode | 0o111)
    return path


def _flags(root: Path, run: Run) -> list[str]:
    return [*run.arguments, f"--workdir={os.path.join(root, run.name)}"]
