"""Runs Python programs in processes that have guestpv loaded already: each is forked from one that waits.

To load what a command needs takes seconds under emulation, and tests start hundreds of commands. The agent
asks for a program over file descriptor 3 (see ``agent.Warm``); the new process is the agent's own child, has
a session, a name, an environment and standard streams of its own, and ends as any Python program does.
"""

import ctypes
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import socket
import sys
import termios
import types

CONTROL = 3
PR_SET_NAME = 15
PACKAGES = ("cli", "drivers", "pci", "services", "transport", "vfio", "virtqueue")
LIBRARIES = (
    "click.shell_completion",
    "numpy",
    "pyroute2",
    "pyudev",
    "rich.console",
    "rich.live",
    "rich.progress",
    "rich.table",
    "rich.text",
)


def load():
    """Import what commands and drivers use."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for package in PACKAGES:
        top = importlib.import_module(f"guestpv.{package}")
        for module in pkgutil.iter_modules(top.__path__, f"{top.__name__}."):
            importlib.import_module(module.name)


def serve(control):
    """Fork a process for each request; returns in such a process, with its request."""
    libc = ctypes.CDLL(None)
    while True:
        message, streams, _, _ = socket.recv_fds(control, 1 << 17, 3)
        if not message:
            os._exit(0)
        # The one between ends at once, which makes the first process, the agent, the parent.
        between = os.fork()
        if between == 0:
            if pid := os.fork():
                control.send(str(pid).encode())
                os._exit(0)
            control.close()
            request = json.loads(message)
            os.setsid()
            for target, stream in enumerate(streams):
                os.dup2(stream, target)
                os.close(stream)
            if os.isatty(0):
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
                # Those that are there were made for a pipe, and keep what they are given.
                sys.stdin = os.fdopen(0, closefd=False)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            libc.prctl(PR_SET_NAME, os.path.basename(request["argv"][0]).encode())
            return request
        os.waitpid(between, 0)
        for stream in streams:
            os.close(stream)


def become(argv, cwd, env):
    """Be ``guestpv ...`` or ``python FILE ...`` (``-`` is standard input)."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if argv[0] == "guestpv":
        from guestpv.cli.main import main

        sys.argv = argv
        sys.exit(main())
    sys.argv = argv[1:]
    name = sys.argv[0]
    if name == "-":
        source = sys.stdin.buffer.read()
    else:
        with open(name, "rb") as file:
            source = file.read()
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(source, name, "exec"), program.__dict__)


if __name__ == "__main__":
    del sys.path[0]
    load()
    gc.collect()
    gc.freeze()
    become(**serve(socket.socket(fileno=CONTROL)))
