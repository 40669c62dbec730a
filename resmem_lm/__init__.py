"""ResMem for language models: learn what you can and memorize the rest (Yang et al., NeurIPS 2023)."""

__version__ = "0.1.0"
