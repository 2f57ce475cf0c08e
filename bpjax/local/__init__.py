"""Losses of their own for the blocks of a model."""
