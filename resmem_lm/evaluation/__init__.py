"""Neighbors, scores, hyperparameters and results."""
