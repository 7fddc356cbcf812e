"""Staging memory, and the writer process of background saves."""
