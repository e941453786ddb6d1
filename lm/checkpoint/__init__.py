"""Checkpoints: `manager` saves, verifies, restores and deletes; `manifest` describes the content;
`step_files` reads the files without devices; `restore` brings them to devices.
"""
