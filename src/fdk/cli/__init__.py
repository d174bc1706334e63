"""The fdk command: info, explain, quantise, convert, eval, generate, warmup, bench, serve-bench, plot.

Exit status 0, 1 if it failed, 2 for a wrong command line. One module a command, with its flags and what it does;
`command` has the parser and `main`.
"""

from fdk.cli.command import main, parser

__all__ = ["main", "parser"]
