"""lm: pretrain language models in JAX and Flax, from a laptop CPU to thousands of TPU or GPU chips."""
