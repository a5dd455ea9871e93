"""The scheduler under a virtual clock: a trace of requests over modelled workers, replayed in seconds of CPU.

What decides is the very object that production runs (``routing.scheduler.Scheduler``); what is modelled is the engine
(``engine.py``). Pure and deterministic: the same trace, fleet and settings give the same result, to the last bit.
"""
