"""Reinforcement learning from feedback for language models, on PyTorch Lightning."""
