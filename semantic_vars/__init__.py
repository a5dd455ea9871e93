"""Workflows of calls to models as one dataflow graph (after Parrot, OSDI 2024): which call may run, with what text."""
