"""Python code in processes of its own that start with the slow imports done.

Imports take longer than what most of these processes do. A server does them once and is forked. What reads the
environment when it is imported (huggingface_hub and all above it) is imported by a second server, for processes whose
environment is as that of the tests there.
"""

import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from tempfile import TemporaryDirectory
from types import ModuleType

_PRELOADED = [
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "bitsandbytes",
    "pandas",
    "pyarrow.dataset",
    "scipy.stats",
    "sklearn.cluster",
    "sklearn.neural_network",
    # Where it is installed, accelerate imports it to take wrappers off a model.
    *(["deepspeed"] if importlib.util.find_spec("deepspeed") else []),
]
_OF_THE_ENVIRONMENT = [
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "hf_ensemble.callbacks",
    "hf_ensemble.cli.main",
    "hf_ensemble.train",
]
# What these read when they are imported.
_READ = ("HF_", "HUGGINGFACE", "TRANSFORMERS_", "TRL_", "PEFT_", "DS_", "XDG_", "HOME")
_STREAMS = ("stdout", "stderr")
_CONTEXT = multiprocessing.get_context("forkserver")


def _server(*modules: str) -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    server.set_forkserver_preload(list(modules))
    return server


_BARE, _WHOLE = _server(*_PRELOADED), _server(*_PRELOADED, *_OF_THE_ENVIRONMENT)


def _start(process: multiprocessing.Process, environment: Mapping[str, str]) -> None:
    """Start a process from the server whose imports are right for its environment."""
    read = [{name: own[name] for name in own if name.startswith(_READ)} for own in (environment, os.environ)]
    server = _WHOLE if read[0] == read[1] else _BARE
    # The context knows one server only.
    connect, forkserver.connect_to_new_process = forkserver.connect_to_new_process, server.connect_to_new_process
    try:
        process.start()
    finally:
        forkserver.connect_to_new_process = connect


class PythonProcess:
    """Python code in a process of its own, which is started at once.

    Args:
        code (`str`): run as `__main__`.
        *arguments (`str`): `sys.argv[1:]`.
        environment (`Mapping[str, str]`, *optional*): all of its variables; those of this process by default.
        folder (`Path`, *optional*): working directory; that of this process by default.
    """

    def __init__(
        self, code: str, *arguments: str, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ):
        self.code = code
        # Removed with the object, at the latest.
        self._streams = TemporaryDirectory()
        environment = dict(environment or os.environ)
        given = (code, list(arguments), environment, str(folder or Path.cwd()), self._streams.name)
        self._process = _CONTEXT.Process(target=_run, args=given)
        _start(self._process, environment)

    def kill(self) -> None:
        """End it, and the processes that it has started, where it has not ended by itself."""
        if self._process.exitcode is None:
            # One that has only just begun has no group of its own yet.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()

    def wait(self, timeout: float = 280) -> CompletedProcess:
        """Wait for its end; where that does not come, it is killed and `subprocess.TimeoutExpired` is raised.

        Returns:
            `subprocess.CompletedProcess`: with `stdout` and `stderr` as text.
        """
        self._process.join(timeout)
        streams = [(Path(self._streams.name) / stream).read_text() for stream in _STREAMS]
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutExpired(self.code, timeout, *streams)
        return CompletedProcess(self.code, self._process.exitcode, *streams)


def run_python(code: str, *arguments: str, timeout: float = 280, **options) -> CompletedProcess:
    """Run a [`PythonProcess`] to its end."""
    return PythonProcess(code, *arguments, **options).wait(timeout)


def run_ranks(code: str, count: int, *arguments: str, timeout: float = 280) -> list[CompletedProcess]:
    """Run `code` in `count` processes that torch.distributed finds to be ranks of one world, as torchrun starts them.

    None is stopped because another failed; all that run still are killed where the time is over.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    environments = [{**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    end = time.monotonic() + timeout
    processes = [PythonProcess(code, *arguments, environment=environment) for environment in environments]
    try:
        return [process.wait(max(end - time.monotonic(), 1)) for process in processes]
    finally:
        for process in processes:
            process.kill()


def _run(code: str, arguments: list[str], environment: dict[str, str], folder: str, streams: str) -> None:
    """What the process does."""
    # What it starts is killed with it.
    os.setsid()
    for number, name in enumerate(_STREAMS, 1):
        os.dup2(os.open(f"{streams}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(code, "<code>", "exec"), vars(main))
