"""Training runs: what a resumed one must keep."""
