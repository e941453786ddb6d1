"""Scaling laws: from a table of small runs to constants with intervals, and to a plan.

`table` reads and checks, `parametric` and `frontier` fit, `intervals` says how sure that is,
`analysis` makes the one JSON of a fit, `planner` plans from it, `figures` draws.
"""
