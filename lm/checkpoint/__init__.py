"""Checkpoints: `manager` saves, verifies, restores and deletes, `manifest` says what one holds,
`stored` reads its files without devices, `restore` brings them to devices.
"""
