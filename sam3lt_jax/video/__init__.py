"""Clips: objects followed from frame to frame, in memory that does not grow."""
