"""Scores of completions: verifiable answers, formats, and their weighted sum."""
