"""Records of a run and their pictures."""
