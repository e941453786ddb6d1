"""Many runs of one config: which values they have (space, adaptive), running them here or on a
cluster (pool, cluster), and what came of them (report).
"""
