"""Safeguards of a run: folder lock, stop signals, watchdog, data ledger, kernel check."""
