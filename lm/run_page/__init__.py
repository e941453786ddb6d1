"""One page for a run, several runs or a sweep, and the live view of a run in a terminal."""
