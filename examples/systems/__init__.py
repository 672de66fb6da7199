"""The related systems on the small world of the quickstart: `python -m examples.systems`."""
