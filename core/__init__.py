"""NAMES: nouns that every layer shares. No I/O, no clock of its own, no web framework."""
