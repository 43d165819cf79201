"""Loss of rows of logits: cross-entropy and KL to a teacher."""
