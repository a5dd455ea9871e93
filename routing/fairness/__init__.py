"""Who is served next, and at whose expense: one module per step of a policy, and ``line.py``, which asks them.

Nothing in here knows of workers or legs beyond what a decision needs; ``routing.scheduler`` does.
"""
