"""Compiled Python objects: the buffer pool and the CPU's instruction sets."""
