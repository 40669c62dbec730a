"""Benchmarks; each prints the name of the processor."""
