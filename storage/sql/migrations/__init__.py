"""Revisions of the tables, oldest first. Each has ``upgrade(op)`` and no way back: going back is restoring a backup."""
