"""The target that does not count, as `data/` writes and `model/` reads it."""

IGNORE = -100
"""Target of a position where nothing is to be predicted; PyTorch's default `ignore_index`."""
