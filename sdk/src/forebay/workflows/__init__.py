"""Workflows: graphs of calls over variables, written as plain functions over values that do not exist yet."""

from forebay.workflows._bodies import Loop
from forebay.workflows._functions import LlmFunction, RemoteTool, ToolFunction, embed, llm, prompt, tool
from forebay.workflows._options import Budget, RunStatus
from forebay.workflows._run import AsyncRun
from forebay.workflows._sync import Run
from forebay.workflows._terms import Retry
from forebay.workflows._var import Input, Piece, Var, join

__all__ = [
    "AsyncRun",
    "Budget",
    "Input",
    "LlmFunction",
    "Loop",
    "Piece",
    "RemoteTool",
    "Retry",
    "Run",
    "RunStatus",
    "ToolFunction",
    "Var",
    "embed",
    "join",
    "llm",
    "prompt",
    "tool",
]
