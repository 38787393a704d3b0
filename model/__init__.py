"""What the network is: DeepSeek-VL2 in PyTorch, its processor, its checkpoints and the directory formats."""
