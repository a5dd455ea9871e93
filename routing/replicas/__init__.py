"""Several gateways decide as one: whoever holds a model's lease decides for all, the others ask and obey.

``desk.py`` is one model in one gateway, ``desks.py`` all models of it, ``messages.py`` what gateways tell each other.
All of it is synchronous and pure, like the scheduler it feeds; ``gateway/replicas.py`` moves the messages.
"""
