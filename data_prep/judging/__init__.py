"""Judges: what they are asked, how their replies are parsed, and what several of them come to."""
