"""Window attention: reference, chunked and recurrent forms."""
