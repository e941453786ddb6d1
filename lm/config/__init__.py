"""Configs of runs: schema, conversion, and the command line."""
