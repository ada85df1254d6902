"""Ends a script on Ctrl-C or SIGTERM (clusters send it before they take a machine back).

The script ends with one line and exit code 130 or 143, never with a traceback. Before training, a stop ends it at once,
by raising Stopped. Once training has called `hold()`, a stop waits: the training loops check `asked()` whenever their
state can be saved. Then they save it and call `leave()`. A second stop ends the script at once. Importing this module
does not load torch.
"""

import os
import shlex
import signal
import sys
import threading
from contextlib import contextmanager
from multiprocessing import resource_tracker

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The user or the system wants the script to end. `except Exception` does not catch it."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}")
        self.number, self.code = number, 128 + number


class _Now:
    begun = True  # False while modules are loaded: then a stop ends the process at once
    held = False  # a stop waits until a training loop calls leave()
    number = None  # the signal that waits
    raised = None  # the signal that ended the script
    words = ()  # flags that the command to go on needs beside those that were given


def ignore():
    """Ignores both signals from now on, while the script ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame):
    if not _Now.begun:
        os.write(2, f"{Stopped(number)} before it began\n".encode())
        os._exit(128 + number)
    if not _Now.held or _Now.number is not None:
        ignore()
        _Now.raised = number
        raise Stopped(number)
    _Now.number = number
    # print is not safe in a signal handler
    os.write(2, b"\nstopping: the state is being saved (a second Ctrl-C or SIGTERM stops without saving)\n")


def _drop(unraisable):
    """Prints nothing about a Stopped that Python dropped: leave() raises it again."""
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)


def catch(begun: bool = True):
    """From now on both signals are handled as this module says. With begun=False, while a script loads its modules,
    they end it at once. A signal that is ignored (nohup, a background job of a shell script) stays ignored."""
    _Now.begun, _Now.held, _Now.number, _Now.raised, _Now.words = begun, False, None, None, ()
    sys.unraisablehook = _drop
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _handle)


def hold():
    _Now.held = True


def also_needs(*words: str):
    """Adds words to the command that is printed after a stop. They name what the run chose, such as its dataset."""
    _Now.words = words


def forget():
    """Forgets a stop, so that another script can run in this process, for example in a test."""
    _Now.held, _Now.number, _Now.raised = False, None, None


def asked() -> bool:
    return _Now.number is not None or _Now.raised is not None


def raised() -> int | None:
    """The signal that ended the script, if one did."""
    return _Now.raised


def leave():
    """Raises Stopped if a stop was asked for.

    Long loops call it in every round, even loops that a stop should end at once. The reason: if a signal arrives during
    a callback, such as that of a weak reference, Python drops the exception that it raises, and goes on.
    """
    number = _Now.raised if _Now.number is None else _Now.number
    if number is not None:
        _Now.raised = number
        raise Stopped(number)


def how_to_go_on() -> str:
    """The command that continues the work: this one, with --resume if training had begun."""
    if not _Now.held:
        return shlex.join(sys.orig_argv)
    command = [word for word in sys.orig_argv if word not in ("--overwrite", "--resume")]
    return shlex.join([*command, *_Now.words, "--resume"])


@contextmanager
def not_for_children():
    """Processes that are started inside receive neither signal until they call in_worker. (Ctrl-C in a terminal goes to
    all processes.) For this process the signals wait until the block ends."""
    resource_tracker.ensure_running()  # started later, it would unblock Ctrl-C
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_worker(make, parent: int):
    """Returns make(). In a process other than `parent`, both signals do nothing from now on: a worker ends when the
    parent closes its pipe. They get an empty handler, not SIG_IGN, since a worker's games would inherit SIG_IGN."""
    if os.getpid() != parent:
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    return make()
