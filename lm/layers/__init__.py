"""Building blocks of models: linen modules and the pure functions under them.

Modules take plain values and `Rules`, never a config; the layer that needs a new equation is a new
file.
"""
