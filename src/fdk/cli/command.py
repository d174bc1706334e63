"""The command line: its parser, the command that it asks for, and one line for every error."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from fdk.cli import convert, evaluate, explain, generate, info, interrupts, quantise, warmup
from fdk.cli.flags import UsageError
from fdk.cli.output import until_the_reader_leaves, unwritten
from fdk.errors import FdkError

COMMANDS = {
    "info": info,
    "explain": explain,
    "quantise": quantise,
    "convert": convert,
    "eval": evaluate,
    "generate": generate,
    "warmup": warmup,
}
# Commands that read their own flags: the module, what it is, the help.
PROGRAMS = {
    "bench": ("fdk.bench", "benchmark", "measure the kernels; the same as python -m fdk.bench"),
    "serve-bench": ("fdk.bench.serve", "benchmark of vLLM", "measure vLLM with formats beside each other"),
    "plot": ("fdk.bench.plots", "plots", "draw figures from records; fdk plot --help"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UsageError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The command line, without the flags of bench, serve-bench and plot, which read their own."""
    p = _Parser(prog="fdk", description="Low-bit weights: quantise models, see which kernel serves them, measure.")
    p.add_argument("--version", action="store_true", help="print the version")
    commands = p.add_subparsers(dest="command", metavar="command", parser_class=_Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP)
        module.add_flags(command)
        command.set_defaults(run=module.run)
    for name, (_, _, text) in PROGRAMS.items():
        commands.add_parser(name, help=text, add_help=False)
    return p


def _run_program(command: str, argv: list[str]) -> int:
    name, what, _ = PROGRAMS[command]
    if importlib.util.find_spec(name) is None:
        raise FdkError(f"this installation has no {what}; install the whole package again")
    module = importlib.import_module(name)
    return module.main(argv) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; every expected error is one line with its remedy (FDK_DEBUG=1 adds the traceback)."""
    return until_the_reader_leaves(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def _main(arguments: list[str]) -> int:
    debug = os.environ.get("FDK_DEBUG") == "1"
    interrupts.seen.clear()
    try:
        if arguments and arguments[0] in PROGRAMS:
            return _run_program(arguments[0], arguments[1:])
        p = parser()
        args, unknown = p.parse_known_args(arguments)
        if unknown:
            command = f"fdk {args.command}" if args.command else "fdk"
            raise UsageError(f"unrecognized arguments: {' '.join(unknown)}; see {command} --help")
        if args.version:
            import fdk

            print(f"fdk {fdk.__version__}")
            return 0
        if args.command is None:
            p.print_help()
            return 0
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"fdk {args.command}: {message}", file=sys.stderr)
            return args.run(args)
    except UsageError as error:
        return _fail(arguments, str(error), 2, debug)
    except FdkError as error:
        return _fail(arguments, str(error), 1, debug)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(arguments, unwritten(error), 1, debug)
    except KeyboardInterrupt:
        return _fail(arguments, "interrupted; nothing half-written was kept", 130, debug)
    except Exception as error:
        if _out_of_memory(error):
            return _fail(arguments, "out of memory; free some, use a smaller model, or ask for less", 1, debug)
        text = str(error).splitlines()[0] if str(error) else ""
        return _fail(arguments, f"{type(error).__name__}: {text} (a defect of fdk; FDK_DEBUG=1 shows where)", 1, debug)


def _out_of_memory(error: Exception) -> bool:
    """Of Python, of a GPU, or of torch's allocator of host memory, whose error is a RuntimeError."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _fail(arguments: list[str], text: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    if interrupts.seen:
        text, status = "interrupted; nothing half-written was kept", 130
    command = f"fdk {arguments[0]}" if arguments and arguments[0] in {*COMMANDS, *PROGRAMS} else "fdk"
    print(f"{command}: {' '.join(text.split())}", file=sys.stderr)
    return status
