"""Checkpoints: `manager` saves, restores and deletes; `manifest` describes the content;
`step_files` and `arrays` read the files without devices, `verification` all of them, each process
its share; `restore` brings them to devices; `memory` keeps snapshots on the hosts.
"""
