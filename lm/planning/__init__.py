"""Plans of runs on absent chips, compiled ahead of time: whether they fit, their time, searches."""
