"""What scripts/hf_import.py adds to the model of a config.json: how to go on training it.

Small constant steps, for a model that has been trained. The rows are of 1,024 tokens, or of the
model's longest where that is less. Data, and the length of the run, are to be given:

    python scripts/hf_import.py --source=FOLDER --workdir=RUN --config.data.train="('STORE',)"
    python scripts/train.py --config=configs/run.py:RUN --workdir=RUN --config.train.num_steps=1000
"""

from lm.config import default


def get_config():
    config = default(model="decoder", objective="causal")
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
