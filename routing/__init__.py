"""DECIDES which worker serves what, and when. Synchronous and without I/O: events in, effects out."""
