"""Gated attention: reference, chunked and recurrent forms."""
