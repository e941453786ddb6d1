"""Building blocks of models: linen modules and the pure functions under them.

Those of transformers take a `BlockConfig`, all others plain values; a new equation is a new file.
"""
