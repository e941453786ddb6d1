"""Continue to train a model that scripts/hf_import.py made a run of.

    configs/imported.py        what an import adds to the model of a config.json
    configs/imported.py:RUN    the config that the import wrote into the folder RUN

Small constant steps, for a model that has been trained. Rows are of 1,024 tokens, or of the model's
longest where that is less. Other data than the store below is named at the import (later,
`checkpoint.allow_changed` must allow it):

    python scripts/hf_import.py --source=FOLDER --workdir=RUN --config.data.train="('STORE',)"
    python scripts/train.py --config=configs/imported.py:RUN --workdir=RUN \\
        --config.train.num_steps=5000
"""

from pathlib import Path

from lm.config.conversion import default, from_json


def get_config(arg=None):
    if arg is not None:
        path = Path(arg) / "config.json"
        if not path.exists():
            raise ValueError(f"configs/imported.py:{arg} holds no run: it has no config.json")
        return from_json(path.read_text())
    config = default(model="decoder", objective="causal")
    config.data.train = ("data/mine/train",)
    config.data.length = 1024
    config.data.batch_size = 8

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = 2e-5
    optimizer.weight_decay = 0.0
    optimizer.b2 = 0.999
    optimizer.schedule.kind = "constant"
    optimizer.schedule.warmup_steps = 100

    config.train.num_steps = 1000
    return config
