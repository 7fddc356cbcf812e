"""A state dict to and from a tree, tensors and memory; which rank holds and saves which part."""
