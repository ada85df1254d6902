"""What every script checks: input that can't be used, flags out of range, the device.

Importing it does not load torch.
"""

import math
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class BadInput(ValueError):
    """The user's input can't be used; the message says what is wrong and what to do. Scripts exit with code 2."""


class NoSimulator(BadInput):
    """No simulator for this env is installed here, or none exists; the message says which and how to get it."""


class Stopped(KeyboardInterrupt):
    """SIGTERM came, which is how a cluster stops a job. It ends what is going on as Ctrl-C does."""


def run_script(main, *args, go_on: str = ""):
    """Calls main(*args). Input that can't be used ends in one line and exit code 2.

    Ctrl-C and SIGTERM end in one line, too, and exit code 130 or 143; `go_on` is the command that goes on from there.
    Whatever main has open is closed on the way out, and further signals are ignored for that time.
    """

    came = []

    def stop(number, frame):
        came.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise Stopped if number == signal.SIGTERM else KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # signals are that thread's alone
        for each in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(each) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(each, stop)
    try:
        main(*args)
    # A library that is interrupted anywhere may raise something else on the way out, so `came` counts, not the type.
    except (Exception, KeyboardInterrupt) as error:
        if came or isinstance(error, KeyboardInterrupt):
            sigterm = isinstance(error, Stopped) or came == [signal.SIGTERM]
            name, code = ("SIGTERM", 143) if sigterm else ("Ctrl-C", 130)
            print(f"\nstopped by {name}" + (f"; to go on: {go_on}" if go_on else ""), file=sys.stderr)
            sys.exit(code)
        if isinstance(error, BadInput):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        raise


def check_positive(args, *names: str):
    """Raises BadInput for a flag that is not a positive finite number."""
    for name in names:
        if not 0 < getattr(args, name) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} is {getattr(args, name)}: give a positive number")


def pick_device(name: str, tf32: bool = False) -> "torch.device":
    """Raises BadInput for a device that is not there.

    With tf32, float32 matrix products use it from now on where they can.
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
        raise BadInput(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name}: use cpu or cuda")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams and graphs are the current GPU's
    return device
