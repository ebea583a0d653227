"""The parts of one_rank.py and fast_path.py: a GPT in plain PyTorch, and a process that trains alone."""
