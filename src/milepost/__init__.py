"""Milepost: checkpoints for PyTorch training that are atomic, verified and as fast as the disk."""

__version__ = "0.1.0"
