"""Checkpoints side by side: one HTML page, Markdown and a picture."""
