"""Mixture of experts: routing, dispatch, and grouped products."""
