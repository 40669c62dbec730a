"""Text: sources, documents, near-duplicates, vocabulary, windows and packed rows."""
