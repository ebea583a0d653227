"""The value that marks a target as ignored, shared by the loader, which sets it, and the loss, which skips it."""

IGNORE = -100  # as PyTorch's default `ignore_index`
