"""Rollouts: engines that generate completions, and what is done with them."""
