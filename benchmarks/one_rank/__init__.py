"""The parts of one_rank.py, and the GPT in plain PyTorch that fast_path.py uses too."""
