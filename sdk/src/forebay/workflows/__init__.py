"""Workflows: graphs of calls over variables, written as plain functions over values that do not exist yet."""

from forebay.workflows._bodies import Loop
from forebay.workflows._functions import LlmFunction, RemoteTool, ToolFunction, embed, llm, prompt, tool
from forebay.workflows._options import Budget, CriticalPath, RunStatus, Step
from forebay.workflows._run import AsyncRun
from forebay.workflows._sync import Run
from forebay.workflows._terms import Retry
from forebay.workflows._var import Input, Piece, Var, join

__all__ = [
    "AsyncRun",
    "Budget",
    "CriticalPath",
    "Input",
    "LlmFunction",
    "Loop",
    "Piece",
    "RemoteTool",
    "Retry",
    "Run",
    "RunStatus",
    "Step",
    "ToolFunction",
    "Var",
    "embed",
    "join",
    "llm",
    "prompt",
    "tool",
]
