"""Views inside a model and a run, and their plots."""
