"""Optimizers, schedules, and parametrizations."""
