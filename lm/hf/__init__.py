"""Hugging Face checkpoints in and out.

A family of models is a module with the name of its `model_type` in config.json and a `FAMILY`
(lm/hf/family.py). Nothing is dropped in silence: a key of config.json that nothing reads, a value
that can't be represented, a tensor without a parameter and a parameter without a tensor are errors.
"""
