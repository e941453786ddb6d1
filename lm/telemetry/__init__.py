"""Records of a run: metrics, progress, time by phase, and the loss curve."""
