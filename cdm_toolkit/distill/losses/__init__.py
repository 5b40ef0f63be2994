"""One small pure function a method, from gathered logits to the sums of a batch."""
