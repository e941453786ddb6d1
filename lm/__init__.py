"""Pretrain language models in JAX and Flax, from a laptop to thousands of chips."""
