"""Delta-rule attention: reference, chunked and recurrent forms."""
