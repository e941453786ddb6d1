"""Probes of a trained causal model: social bias, canaries, verbatim memorization, membership.

Each probe measures with `lm.generation` and returns tables whose figures carry bootstrap intervals;
`report` writes them. No text of the training data or of a canary is in a table.
"""
