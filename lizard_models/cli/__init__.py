"""The command line, ``lizard-attn``."""
