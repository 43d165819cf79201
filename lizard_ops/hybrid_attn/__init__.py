"""Hybrid attention: reference, chunked and recurrent forms."""
