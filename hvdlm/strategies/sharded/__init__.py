"""Ranks divide optimizer state, gradients and parameters among them: ZeRO (Rajbhandari et al., SC 2020)."""
