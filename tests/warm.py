"""Runs commands in new processes that need not import torch and diffusers: that takes seconds.

One process imports those and waits; each command is a fork of it, with its own words, folder,
environment and files. controlfill's own modules are imported by the command, as ever.

    python tests/warm.py DOOR                     waits at a Unix socket
    python tests/warm.py DOOR controlfill WORDS   runs a command there, as if it ran here
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

HEAVY = {
    "cv2": (), "scipy.stats": (), "skimage.restoration": (), "torch.utils.tensorboard": (),
    "accelerate": (), "lightning": (), "peft": (),
    "transformers": ("CLIPTextModel", "CLIPTokenizer"),
    "diffusers": ("AutoencoderKL", "ControlNetModel", "DDIMScheduler", "UNet2DConditionModel"),
}  # fmt: skip


class Warm:
    """The waiting process, as long as the block lasts."""

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp())  # a socket's path is short
        self.door = self.folder / "door"
        self.process = subprocess.Popen([sys.executable, __file__, str(self.door)])
        while not self.door.exists():
            assert self.process.poll() is None, "the waiting process came to an end"
            time.sleep(0.05)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder)

    def run(self, words, cwd):
        """What `subprocess.run` gives: `words` begin with controlfill, python FILE or python -c."""
        with (
            tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err,
            open(os.devnull) as nothing,
        ):  # fmt: skip
            code = ask(self.door, words, cwd, [f.fileno() for f in (nothing, out, err)])
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(words, code, out.read(), err.read())

    def path(self):
        """A PATH on which `controlfill` is such a command, for scripts."""
        shim = self.folder / "controlfill"
        start = f'"{sys.executable}" -S "{__file__}" "{self.door}" controlfill "$@"'
        shim.write_text(f"#!/bin/sh\nexec {start}\n")
        shim.chmod(0o755)
        return os.pathsep.join([str(self.folder), os.environ["PATH"]])


def ask(door, words, cwd, files):
    """Have a command run with `files` as its input, output and errors; its exit code."""
    with socket.socket(socket.AF_UNIX) as visitor:
        visitor.connect(str(door))
        told = {"words": [str(word) for word in words], "cwd": str(cwd), "env": dict(os.environ)}
        socket.send_fds(visitor, [b" "], files)
        visitor.sendall(json.dumps(told).encode())
        visitor.shutdown(socket.SHUT_WR)
        return int(visitor.recv(16))


def wait(door):
    """Answer every visitor; returns only in the process that is to run a command: what is asked."""
    with socket.socket(socket.AF_UNIX) as place:
        place.bind(f"{door}.new")
        place.listen()
        os.rename(f"{door}.new", door)
        # Those who answer are not waited for.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            visitor, _ = place.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                place.close()
                return answer(visitor)
            visitor.close()


def answer(visitor):
    """Fork the command, wait for it and send its exit code."""
    _, files, *_ = socket.recv_fds(visitor, 1, 3)
    told = json.loads(b"".join(iter(lambda: visitor.recv(65536), b"")))
    command = os.fork()
    if command == 0:
        visitor.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        return told
    for file in files:
        os.close(file)
    _, status = os.waitpid(command, 0)
    visitor.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(told):
    """Run what is asked as Python would: its folder, environment, words and first path."""
    os.chdir(told["cwd"])
    os.environ.clear()
    os.environ.update(told["env"])
    name, *words = told["words"]
    if name == "controlfill":
        sys.path[0], sys.argv = told["cwd"], [name, *words]
        runpy.run_module("controlfill", run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[0], sys.argv = "", ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(Path(words[0]).resolve().parent), words
        runpy.run_path(words[0], run_name="__main__")


def main():
    door, *words = sys.argv[1:]
    if words:
        sys.exit(ask(door, words, os.getcwd(), [0, 1, 2]))
    for module, names in HEAVY.items():
        found = importlib.import_module(module)
        for name in names:  # these two load their classes when they are asked for
            getattr(found, name)
    gc.freeze()
    told = wait(door)
    try:
        become(told)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    leave(code)


def leave(code):
    """End as Python would, but for taking all those modules apart one by one: a second."""
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    main()
