"""Evaluation beyond the loss: predictions and metrics of tasks, lm-eval, BLiMP."""
