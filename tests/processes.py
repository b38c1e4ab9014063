"""Commands in processes of their own, forked from one that has imported the heavy libraries already.

Those imports take longer than most tests. Apart from that, a command is the same as in a shell: arguments, folder,
environment, output, signals, exit code.
"""

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parents[1]

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "tests.conftest",  # for its settings of the garbage collector
        "torch.distributed.fsdp",
        "transformers.trainer",
        "datasets",
        "peft",
        "trl.trainer.reward_trainer",
        "matplotlib.pyplot",
    ]
)


class Command:
    """`python -m module arguments`, started in the folder `cwd` with `environment` added to that of the tests."""

    def __init__(self, module, *arguments, cwd=REPOSITORY, **environment):
        self._output, self._errors = (tempfile.NamedTemporaryFile() for _ in range(2))  # noqa: SIM115 (as long as we)
        environment = dict(os.environ) | {name: str(value) for name, value in environment.items()}
        call = (module, [str(argument) for argument in arguments], str(cwd), environment)
        self._process = FORKED.Process(target=_run, args=(*call, self._output.name, self._errors.name))
        self._process.start()
        self.pid = self._process.pid

    @property
    def output(self):
        return Path(self._output.name).read_text()

    @property
    def errors(self):
        return Path(self._errors.name).read_text()

    @property
    def exit_code(self):
        """None while it runs; minus the number of the signal that ended it."""
        return self._process.exitcode

    def wait(self, seconds=300):
        """Its exit code once it has ended by itself, which it must within `seconds`."""
        self._process.join(seconds)
        if self.exit_code is None:
            self.kill()
            raise TimeoutError(f"it ran for more than {seconds} s\n{self.output}\n{self.errors}")
        return self.exit_code

    def wait_until(self, condition, seconds=300):
        """Returns once `condition()` holds, which must be before the command ends and within `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.exit_code is None, f"it ended too early\n{self.output}\n{self.errors}"
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"it did not come so far in {seconds} s\n{self.output}\n{self.errors}")
            time.sleep(0.02)

    def kill(self):
        self._process.kill()
        self._process.join()


def _run(module, arguments, folder, environment, output, errors):
    gc.freeze()  # what was imported is no garbage, and need not be looked through each time that some is collected
    os.setsid()  # a process group, as a shell makes one for each command
    os.chdir(folder)
    sys.path.insert(0, folder)  # as `python -m` does
    os.environ.clear()
    os.environ.update(environment)
    for path, descriptor in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@contextmanager
def started_ranks(num_ranks, module, *arguments, cwd=REPOSITORY, **environment):
    """The module as the ranks of one job, as torchrun starts them; those that still run after the block are killed."""
    # The store is here, as torchrun's is in torchrun: nobody else can take its port.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    environment |= {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    ranks = [
        Command(module, *arguments, cwd=cwd, **environment, RANK=rank, LOCAL_RANK=rank) for rank in range(num_ranks)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


def run_ranks(num_ranks, module, *arguments, cwd=REPOSITORY, **environment):
    """Runs all ranks, which must end with exit code 0, and returns what each printed."""
    with started_ranks(num_ranks, module, *arguments, cwd=cwd, **environment) as ranks:
        exit_codes = [rank.wait() for rank in ranks]
        assert not any(exit_codes), "\n".join(rank.errors for rank in ranks)
        return [rank.output for rank in ranks]
