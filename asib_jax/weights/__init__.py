"""Where weights come from and how they are kept: PyTorch's files and names, checkpoints, kept teachers."""
