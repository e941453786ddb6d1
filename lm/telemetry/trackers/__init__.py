"""Trackers of a run: where its records go, by the names in `config.log.trackers`.

`local.py` has metrics.jsonl and TensorBoard's events, which are written at once. `wandb_run.py` and
`mlflow_run.py` have the clients of Weights & Biases and MLflow, which `background.py` calls from a
thread; a further one is another `RemoteRun`, and a line in `opening.py`.
"""
