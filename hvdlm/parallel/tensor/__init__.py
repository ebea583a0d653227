"""Tensor parallelism: the ranks of an axis divide each matrix of a model among them.

Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism",
arXiv:1909.08053, section 3.
"""
