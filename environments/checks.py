"""Checks that every script makes: bad input, flags out of range, the device.

Importing this module does not load torch.
"""

import errno
import os
import select
import sys
from typing import TYPE_CHECKING

from environments import stops

if TYPE_CHECKING:
    import torch


class BadInput(ValueError):
    """The user's input can't be used. The message says what is wrong and what to do. Scripts exit with code 2."""


class NoSimulator(BadInput):
    """This env's simulator is not installed, or there is no such env. The message says which, and how to get it."""


FAILURES = []  # the messages of fail_at_end


def fail_at_end(message: str):
    """Reports a failure while other work goes on. The line is printed when the script ends, with exit code 1."""
    FAILURES.append(message)


def plain(text: str) -> str:
    """A message on one line, without control characters: a terminal obeys them, and damaged files may hold some."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def say_failures():
    for message in FAILURES:
        print(f"error: {plain(message)}", file=sys.stderr)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be had: by Python, by the system for a new process, or by torch on a CPU or a GPU."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and "allocate" in text and "memory" in text)
    )


def nobody_reads() -> bool:
    """Whether the reader of this script's output has ended, as `head` does. Then the rest of the output is dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLERR)
    gone = bool(poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes its output when it ends
    return gone


def run_script(main, *args, go_on: str = ""):
    """Calls main(*args). Bad input ends the script with one line and exit code 2. For Ctrl-C and SIGTERM see stops.py.

    `go_on` is the command that is printed after a stop, to continue the work. By default it is this command.
    """
    FAILURES.clear()
    try:
        stops.catch()
        main(*args)
        sys.stdout.flush()  # a full disk is seen here
    # A library that is interrupted may raise another exception. So look for a signal, not at the exception's type.
    except (Exception, stops.Stopped) as error:
        number = error.number if isinstance(error, stops.Stopped) else stops.raised()
        if number is not None:
            # A new exception, since the old one's traceback would keep the simulators and their processes alive.
            stop = stops.Stopped(number)
            stops.ignore()
            say_failures()
            print(f"\n{stop}; to go on: {go_on or stops.how_to_go_on()}", file=sys.stderr)
            sys.exit(stop.code)
        if isinstance(error, BrokenPipeError) and nobody_reads():
            sys.exit(1)
        if isinstance(error, BadInput):
            message = str(error)
        elif out_of_memory(error):
            message = f"not enough memory: close other programs, or use a smaller --hidden or fewer --workers ({error})"
        elif isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
            message = f"{error.strerror}: {error.filename or 'free some space and run the command again'}"
        else:
            raise
        say_failures()
        print(f"error: {plain(message)}", file=sys.stderr)
        sys.exit(2)
    finally:
        stops.forget()
    if FAILURES:
        say_failures()
        sys.exit(1)


def check_positive(args, *names: str):
    """Raises BadInput for a flag that is not a positive number, or too large: a float beyond float32, a count beyond
    32 bits."""
    for name in names:
        value = getattr(args, name)
        if not 0 < value < (2**31 if isinstance(value, int) else 1e38):
            most = 2**31 if isinstance(value, int) else "1e38"
            raise BadInput(f"--{name.replace('_', '-')} is {value}: give a positive number below {most}")


def pick_device(name: str, tf32: bool = False) -> "torch.device":
    """Raises BadInput for a device that does not exist.

    With tf32, float32 matrix products use TF32 from now on, if the device supports it.
    """
    import torch

    if tf32:
        torch.set_float32_matmul_precision("high")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        how = "use --device auto, which takes a GPU where there is one"
        raise BadInput(f"--device {name}: {str(error).splitlines()[0]}; {how}") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name}: use cpu or cuda")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams and graphs belong to the current GPU
    return device
