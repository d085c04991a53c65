"""The command line, ``rlhf-lightning``."""
