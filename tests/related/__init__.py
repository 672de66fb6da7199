"""What the official code of the related systems computed, compared with ours (check.py)."""
