"""Sweeps of one config: the space of its values (space, adaptive), runs on this machine or on a
cluster (pool, cluster), and their results (report).
"""
