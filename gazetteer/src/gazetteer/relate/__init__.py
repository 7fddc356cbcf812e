"""What only the whole repository knows about a file: what its imports mean, who uses it, its history."""
