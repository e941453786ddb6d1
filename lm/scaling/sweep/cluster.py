"""The runs of a sweep as commands for a cluster, through the scripts in scripts/launch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from lm.scaling.sweep.pool import CODES, Trial

SLURM = "scripts/launch/slurm.sbatch"
TPU_VM = "scripts/launch/tpu_vm.sh"
GKE = "scripts/launch/gke.sh"

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
folder=${{!#}}
code_file={codes}/${{folder##*/}}
rm -f "$code_file"
bash {script} "$@"
code=$?
echo $code >"$code_file"
exit $code
"""


def write_slurm(root: Path, runs: Sequence[Trial], slots: int, home: str) -> Path:
    """Write ROOT/commands.txt, the flags of a run in each line, and ROOT/array.sbatch, a job array
    of `scripts/launch/slurm.sbatch`, and return the path of the latter.

    home: folder of the runs' folders. A run leaves its exit code in ROOT/codes. ValueError where a
    line, or SLURM, cannot hold a flag or a path.
    """
    if "\\" in str(root):
        raise ValueError(f"--workdir={root}: to SLURM a backslash in a log's name is no part of it")
    (root / CODES).mkdir(parents=True, exist_ok=True)
    commands = root / "commands.txt"
    commands.write_text("".join(_words(home, run) + "\n" for run in runs))
    script = Path(__file__).parents[3] / SLURM
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    # SLURM replaces %x, %A, ... in the name of a log, and %% by %
    log = shlex.quote(f"{root}/".replace("%", "%%") + "%x-%A_%a.log")
    lines = [line.replace("%x-%j.log", log) for line in lines]
    path = root / "array.sbatch"
    text = _ARRAY.format(
        count=len(runs),
        last=len(runs) - 1,
        slots=slots,
        path=shlex.quote(str(path)),
        options="\n".join(lines),
        commands=shlex.quote(str(commands)),
        codes=shlex.quote(str(root / CODES)),
        script=SLURM,
    )
    return _write_script(path, text)


def write_tpu_vm(root: Path, runs: Sequence[Trial], slots: int, home: str) -> Path:
    """Write ROOT/tpu_vm.sh, which trains the runs one after the other on `slots` queued resources,
    NAME-0 and so on, and return its path.

    home: URL of the runs' folders; ValueError for a path, which would be deleted with the machines.
    A run leaves its exit code in ROOT/codes.
    """
    head = [
        f"# {len(runs)} runs on {slots} queued resources, made and deleted for each run. In the",
        f"# folder of the repository:  NAME=sweep ZONE=… TYPE=… {shlex.quote(f'{root}/tpu_vm.sh')}",
        ': "${NAME:?name of the queued resources}" "${ZONE:?zone}" "${TYPE:?accelerator type}"',
        "export ZONE TYPE",
    ]
    return _write_slots(root / "tpu_vm.sh", head, [f'{TPU_VM} train "${{@:2}}"'], runs, slots, home)


def write_gke(root: Path, runs: Sequence[Trial], slots: int, home: str) -> Path:
    """As `write_tpu_vm`: write ROOT/gke.sh, which trains the runs in JobSets."""
    head = [
        f"# {len(runs)} runs, {slots} JobSets at a time. In the folder of the repository, with the",
        f"# other variables of {GKE}:  NAME=sweep IMAGE=… ACCELERATOR=… "
        f"{shlex.quote(f'{root}/gke.sh')}",
        ': "${NAME:?name of the JobSets}" "${IMAGE:?image}" "${ACCELERATOR:?accelerator}"',
        "export IMAGE ACCELERATOR",
    ]
    # what an earlier start of these commands has applied goes on
    train = [f'{GKE} apply "${{@:2}}" && {GKE} await', "local code=$?", f"{GKE} delete"]
    return _write_slots(root / "gke.sh", head, [*train, "(exit $code)"], runs, slots, home)


def _write_slots(
    path: Path, head: list[str], train: list[str], runs: Sequence[Trial], slots: int, home: str
) -> Path:
    """Write a script that trains the runs one after the other in `slots` shells, each with a $NAME
    of its own.

    head: comments and checks; train: commands whose last one has the exit code of the run with the
    flags "${@:2}".
    """
    if "://" not in home:
        raise ValueError(
            f"--write={path.stem}: runs in {home} would be lost with the machines that they ran "
            "on; give --runs=gs://BUCKET/FOLDER"
        )
    (path.parent / CODES).mkdir(parents=True, exist_ok=True)
    lines = [
        "#!/bin/bash",
        *head,
        "name=$NAME; export NAME",
        f"codes={shlex.quote(str(path.parent / CODES))}",
        "train() { # a run, unless an earlier start of these commands has finished it",
        '  [[ $(cat "$codes/$1" 2>/dev/null) == 0 ]] && return',
        *(f"  {command}" for command in train),
        '  echo $? >"$codes/$1"',
        "}",
    ]
    for slot in range(min(slots, len(runs))):
        lines.append(f"( export NAME=$name-{slot}")
        for run in runs[slot::slots]:
            lines.append(f"  train {shlex.quote(run.name)} {_words(home, run)}")
        lines.append(") &")
    return _write_script(path, "\n".join([*lines, "wait", ""]))


def _write_script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | 0o111)
    return path


def _words(home: str, run: Trial) -> str:
    """The flags of a run as words of a shell; the last one is its folder."""
    flags = [*run.arguments, f"--workdir={os.path.join(home, run.name)}"]
    for flag in flags:
        if "\n" in flag:
            raise ValueError(f"{flag!r} has a line break, which no line of commands can hold")
    return shlex.join(flags)
