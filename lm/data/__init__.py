"""Data: text to token stores, token stores to rows. NumPy only; never JAX.

`scripts/prepare_data.py` turns documents (`sources/file_source.py`, `sources/tfds.py`) into token
stores (`sources/tokens.py`) with a tokenizer (`lm.tokenizers`). Training reads rows of a store by
index, so that batch k is a pure function of k.
"""
