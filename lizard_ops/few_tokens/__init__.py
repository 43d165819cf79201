"""What a decode step's attention reads of its tokens, in one launch."""
