"""Tenants that want the same slots: what they ask and when, how it is replayed, and what of it becomes a figure."""
