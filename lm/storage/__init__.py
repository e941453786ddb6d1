"""The door to storage: local folders, `gs://` and `s3://`, through fsspec.

No other module opens, lists, renames, locks or deletes a user's files.
"""
