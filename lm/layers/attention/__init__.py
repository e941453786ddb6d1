"""Attention: the linen modules, and their back ends."""
