"""The config in a run's folder, to go on with it where no other file has it (an import).

    python scripts/train.py --config=configs/run.py:RUN --workdir=RUN --config.train.num_steps=2000

Values given on the command line differ from the run's as with any other config: another `data`
must be allowed by `--config.checkpoint.allow_changed="('data',)"`.
"""

from pathlib import Path

from lm.config import from_json


def get_config(arg=None):
    if not arg:
        raise ValueError("configs/run.py:FOLDER names the folder of a run")
    path = Path(arg) / "config.json"
    if not path.exists():
        raise ValueError(f"{arg} holds no run: there is no config.json in it")
    return from_json(path.read_text())
