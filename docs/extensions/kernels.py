"""Pages run in processes forked from one that has imported what all pages import.

A new interpreter spends three seconds of a page's time on Jupyter, pandas, SciPy and matplotlib.
Every page still has a process of its own: it finds modules imported, and nothing of other pages.
JAX is not among these modules, as its threads would not survive the fork, and since pages of what
runs without it are to run without it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from jupyter_client.provisioning import KernelProvisionerFactory, LocalProvisioner

SHARED = ["ipykernel.kernelapp", "ipykernel.ipkernel", "jaxreml.api.fit", "jaxreml.api.fit_many",
          "matplotlib.figure", "matplotlib.backends.backend_agg"]  # fmt: skip
NAME = "forked-provisioner"
server = multiprocessing.get_context("forkserver")


def run(command: list[str], environment: dict[str, str], folder: str) -> None:
    """What the kernel's command runs, in this process."""
    os.setsid()  # signals go to the kernel and the processes that its cells start
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # As the command has it: without the folder of this file.
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    # It ends when its parent has ended.
    sys.argv = [*command, f"--IPKernelApp.parent_handle={os.getppid()}"]
    from ipykernel import kernelapp

    kernelapp.launch_new_instance()


class Forked:
    """The part of `subprocess.Popen` that Jupyter uses."""

    stdin = stdout = stderr = None

    def __init__(self, *arguments: Any):
        self._process = server.Process(target=run, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.exitcode

    def wait(self) -> int | None:
        """Its exit code, when it has one."""
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it."""
        self._process.kill()


class ForkedProvisioner(LocalProvisioner):
    """Starts a kernel by `run` where Jupyter starts a new interpreter."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
        """The addresses of a kernel that runs ``cmd``, ``python -m ipykernel_launcher -f file``."""
        command = cmd[cmd.index("ipykernel_launcher") :]
        self.process = Forked(command, options["env"], str(options.get("cwd") or Path.cwd()))
        self.pid = self.process.pid
        return self.connection_info


class _Known:
    """Stands in for an entry point of an installed package."""

    def load(self) -> type:
        return ForkedProvisioner


def setup(app: Any) -> dict[str, bool]:
    """Every kernel of this build is started so."""
    if sys.platform.startswith("linux"):
        server.set_forkserver_preload(["__main__", *SHARED])
        forkserver.ensure_running()  # it imports while Sphinx starts
        factory = KernelProvisionerFactory.instance()
        factory.provisioners[NAME] = _Known()
        factory.default_provisioner_name = NAME
    return {"parallel_read_safe": False}
