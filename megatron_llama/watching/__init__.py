"""Watching a run: its numbers, the copies of its state, and slow ranks."""
