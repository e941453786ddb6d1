"""Scaling laws: from a table of small runs to constants with intervals, and to a plan.

`table` reads and checks, `parametric` and `frontier` fit, `intervals` estimates confidence,
`analysis` makes the JSON artefact of a fit, `planner` plans from it, `figures` draws.
"""
