"""Kernels: attention and grouped matrix products, each with its fallback, one choice over them."""
