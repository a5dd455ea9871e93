"""SPEAKS HTTP and the command line, reads the settings, and wires the rest together."""
