"""Faults of the outside: a kill or a full disk at a system call, and files that are nearly right."""
