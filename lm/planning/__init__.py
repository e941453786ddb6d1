"""Ahead-of-time compilation for absent chips: memory, traffic, FLOPs, step time, and searches."""
