"""Estimates of bytes, memory and time."""
