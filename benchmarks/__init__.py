"""Measurements; each prints the processor it ran on."""
