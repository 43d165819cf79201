"""Training and evaluation text: documents, packed sequences, streams, prompts."""
