"""The processes of one run: `environment` says which launcher started them, `presence` which are
there, `distributed` starts and ends them together.
"""
