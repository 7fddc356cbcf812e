"""What the bytes of a checkpoint mean: pure functions and structs, which touch no file. Torch-free."""
