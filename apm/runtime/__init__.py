"""Flags, devices, files, processes, logs: nothing here knows the paper."""
