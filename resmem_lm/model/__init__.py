"""DeepNet: the decoder, its checkpoints and its training."""
