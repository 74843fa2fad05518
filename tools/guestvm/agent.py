"""The guest's first process: runs what the host asks for over a virtio-serial port.

A message, either way, is `>II` (length of head, length of data), a JSON head and the data. Runs with the
guest's Python alone, without site-packages, and is PID 1: it reaps every orphan and must never end.
"""

import errno
import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import sys
import termios
import time

PORT_NAME = "guestpv.agent"
CHUNK = 65536


def find_port():
    """The device node of our virtio-serial port; waits for it to appear."""
    base = "/sys/class/virtio-ports"
    while True:
        for port in os.listdir(base) if os.path.isdir(base) else ():
            with open(f"{base}/{port}/name") as name:
                if name.read().strip() == PORT_NAME:
                    return f"/dev/{port}"
        time.sleep(0.01)


class Warm:
    """Starts Python programs by way of a process that has loaded guestpv; it is started when first needed."""

    PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "warm.py")

    def __init__(self):
        self.control = None

    def start(self, argv, streams, cwd, env):
        """The process id of `argv`, our child."""
        request = json.dumps({"argv": argv, "cwd": cwd, "env": env}).encode()
        for _ in range(2):
            if self.control is None:
                self.control = self.launch()
            try:
                socket.send_fds(self.control, [request], streams)
                if answer := self.control.recv(64):
                    return int(answer)
            except OSError:
                pass
            # It was ended, for lack of memory or by a test.
            self.control.close()
            self.control = None
        raise ChildProcessError("the process that has guestpv loaded does not live")

    def launch(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            try:
                os.setsid()
                null = os.open("/dev/null", os.O_RDWR)
                for target, fd in enumerate((null, null, 2, theirs.fileno())):
                    os.dup2(fd, target)
                os.set_inheritable(3, True)
                default_signals()
                # A thread would not live on in those forked from it.
                os.environ["OPENBLAS_NUM_THREADS"] = "1"
                os.execvp("python", ["python", self.PROGRAM])
            finally:
                os._exit(127)
        theirs.close()
        return ours


def default_signals():
    """What a process that is to run a program must not have from us."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)


class Child:
    """One command started for the host."""

    def __init__(self, ident, pid, stdin):
        self.ident = ident
        self.pid = pid
        self.stdin = stdin
        self.unsent = bytearray()
        self.closing = False
        self.outputs = {}
        self.pty = None


class Agent:
    def __init__(self, port):
        self.port = port
        self.selector = selectors.DefaultSelector()
        self.children = {}
        self.incoming = bytearray()
        self.debug_port = -1
        self.warm = Warm()

    def send(self, head, data=b""):
        encoded = json.dumps(head).encode()
        frame = memoryview(struct.pack(">II", len(encoded), len(data)) + encoded + data)
        while frame:
            frame = frame[os.write(self.port, frame[:CHUNK]) :]

    def serve(self):
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self.selector.register(
            wake_read, selectors.EVENT_READ, lambda _: (os.read(wake_read, 4096), self.reap())
        )
        self.selector.register(self.port, selectors.EVENT_READ, lambda _: self.receive())
        self.send({"event": "ready", "uptime": time.clock_gettime(time.CLOCK_BOOTTIME)})
        while True:
            for key, events in self.selector.select():
                if key.fd in self.selector.get_map():
                    key.data(events)

    def receive(self):
        data = os.read(self.port, CHUNK)
        if not data:
            # Nobody is at the host's end; the port would stay readable and we would spin.
            time.sleep(0.1)
            return
        self.incoming += data
        while len(self.incoming) >= 8:
            head_size, data_size = struct.unpack_from(">II", self.incoming)
            end = 8 + head_size + data_size
            if len(self.incoming) < end:
                return
            head = json.loads(self.incoming[8 : 8 + head_size])
            body = bytes(self.incoming[8 + head_size : end])
            del self.incoming[:end]
            try:
                answer, answer_data = getattr(self, "do_" + head["op"])(head, body) or ({}, b"")
            except Exception as error:
                # The first process must never end; whatever went wrong is the asker's to know.
                answer, answer_data = {"error": str(error) or repr(error)}, b""
            self.send({"reply": head["id"], **answer}, answer_data)

    def do_ping(self, head, _):
        """Nothing but the answer."""

    def do_spawn(self, head, _):
        ident = head["id"]
        if head.get("pty"):
            control, inner = os.openpty()
            self.resize(control, head["size"])
            ours, theirs = [control], [inner, inner, inner]
        else:
            in_read, in_write = os.pipe()
            out_read, out_write = os.pipe()
            err_read, err_write = os.pipe()
            ours, theirs = [in_write, out_read, err_read], [in_read, out_write, err_write]
        for fd in ours:
            os.set_blocking(fd, False)
        try:
            if head.get("warm"):
                cwd, env = head.get("cwd") or "/root", os.environ | (head.get("env") or {})
                pid = self.warm.start(head["argv"], theirs, cwd, env)
            else:
                pid = self.execute(head, theirs)
        except ChildProcessError:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in set(theirs):
                os.close(fd)
        child = Child(ident, pid, ours[0])
        self.children[pid] = child
        if head.get("pty"):
            child.pty = ours[0]
            child.outputs = {ours[0]: "stdout"}
        else:
            child.outputs = {ours[1]: "stdout", ours[2]: "stderr"}
        for fd in child.outputs:
            self.selector.register(
                fd, selectors.EVENT_READ, lambda events, fd=fd: self.on_child(child, fd, events)
            )
        return {"pid": pid}, b""

    def execute(self, head, streams):
        """The process id of a program, started afresh."""
        failed_read, failed_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.setsid()
                for target, fd in enumerate(streams):
                    os.dup2(fd, target)
                if head.get("pty"):
                    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
                default_signals()
                os.chdir(head.get("cwd") or "/root")
                os.environ.update(head.get("env") or {})
                os.execvp(head["argv"][0], head["argv"])
            except BaseException as error:
                os.write(failed_write, f"{head['argv'][0]}: {error}".encode())
            finally:
                os._exit(127)
        os.close(failed_write)
        failure = os.read(failed_read, 4096)
        os.close(failed_read)
        if failure:
            os.waitpid(pid, 0)
            raise ChildProcessError(failure.decode())
        return pid

    def on_child(self, child, fd, events):
        if events & selectors.EVENT_READ and fd in child.outputs:
            self.drain(child, fd, once=True)
        if events & selectors.EVENT_WRITE and fd == child.stdin:
            self.feed(child)

    def drain(self, child, fd, once=False):
        """Forward what `fd` has; forget it at its end."""
        while True:
            try:
                data = os.read(fd, CHUNK)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                data = b""
            if not data:
                self.selector.unregister(fd)
                del child.outputs[fd]
                os.close(fd)
                if fd == child.pty:
                    child.pty = child.stdin = None
                return
            self.send({"event": child.outputs[fd], "id": child.ident}, data)
            if once:
                return

    def do_stdin(self, head, data):
        child = self.child(head)
        child.unsent += data
        child.closing = child.closing or not data
        self.feed(child)

    def feed(self, child):
        """Write what the child takes of its input; come back when it takes more."""
        if child.stdin is None:
            return
        try:
            while child.unsent:
                del child.unsent[: os.write(child.stdin, child.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            child.unsent.clear()
            child.closing = child.pty is None
        wanted = selectors.EVENT_WRITE if child.unsent else 0
        if child.pty is not None:
            if child.pty in child.outputs:
                handler = self.selector.get_key(child.pty).data
                self.selector.modify(child.pty, selectors.EVENT_READ | wanted, handler)
            return
        registered = child.stdin in self.selector.get_map()
        if wanted and not registered:
            fd = child.stdin
            self.selector.register(fd, wanted, lambda events: self.on_child(child, fd, events))
        elif not wanted and registered:
            self.selector.unregister(child.stdin)
        if child.closing and not child.unsent:
            os.close(child.stdin)
            child.stdin = None

    def child(self, head):
        for child in self.children.values():
            if child.ident == head["child"]:
                return child
        raise ProcessLookupError(errno.ESRCH, "the process has ended")

    def do_signal(self, head, _):
        pid = self.child(head).pid
        if head.get("group"):
            os.killpg(pid, head["number"])
        else:
            os.kill(pid, head["number"])

    @staticmethod
    def resize(control, size):
        fcntl.ioctl(control, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))

    def do_resize(self, head, _):
        self.resize(self.child(head).pty, head["size"])

    def do_read_file(self, head, _):
        with open(head["path"], "rb") as file:
            return {}, file.read()

    def do_write_file(self, head, data):
        with open(head["path"], "wb") as file:
            file.write(data)
        os.chmod(head["path"], head["mode"])

    def do_mark(self, head, data):
        if self.debug_port < 0:
            self.debug_port = os.open("/dev/port", os.O_WRONLY | os.O_CLOEXEC)
        os.pwrite(self.debug_port, data, head["port"])

    def reap(self):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            child = self.children.pop(pid, None)
            if child is None:
                continue
            for fd in list(child.outputs):
                self.drain(child, fd)
            if child.pty is None and child.stdin is not None:
                if child.stdin in self.selector.get_map():
                    self.selector.unregister(child.stdin)
                os.close(child.stdin)
                child.stdin = None
            self.send({"event": "exit", "id": child.ident, "status": os.waitstatus_to_exitcode(status)})


def main():
    while not os.path.exists("/run/settled"):
        time.sleep(0.005)
    os.environ.clear()
    os.environ.update(
        PATH="/opt/venv/bin:/usr/sbin:/usr/bin", HOME="/root", USER="root", LANG="C.UTF-8", TERM="linux"
    )
    agent = Agent(os.open(find_port(), os.O_RDWR | os.O_CLOEXEC))
    agent.serve()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        raise
