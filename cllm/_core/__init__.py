"""Compiled Python objects: buffer pool, argument checks, tape, and the CPU's instruction sets."""
