"""Safeguards of a run: folder lock, signals, watchdog, data ledger, start-up check of kernels."""
