"""Data: token stores to rows, rows to batches. NumPy only; never JAX.

Training reads rows of a store (`tokens.py`) by index, so that batch k is a pure function of k.
`lm.preparation` writes the stores.
"""
