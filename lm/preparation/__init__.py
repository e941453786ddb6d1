"""Preparation: documents of `lm.sources`, filtered, split and tokenised, to token stores.

NumPy only; never JAX. `stages.py` lists the steps.
"""
