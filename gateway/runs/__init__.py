"""Runs of workflows: the executor's driver, with its log, its calls and whoever follows it."""
