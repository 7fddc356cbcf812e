"""A checkpoint into the tensors that you have, on one rank or on all."""
