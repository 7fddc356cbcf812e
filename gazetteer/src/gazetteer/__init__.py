"""Gazetteer."""
