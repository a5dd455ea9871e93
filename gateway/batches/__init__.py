"""Batches of requests: read, run as one workflow, and written down as OpenAI's clients read them."""
