"""A step compiled for devices that are not here, and what the compiler says about it: memory,
traffic, work, time.
"""
