"""What the ops share: arguments, sequences, streams of keys, state."""
