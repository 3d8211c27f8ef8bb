"""A command in a process that ``conftest.Command`` forked."""

import os
import resource
import runpy
import sys

import dask


def run(
    module: str,
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    output: str,
    max_file_bytes: int | None,
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    dask.config.refresh()  # from the environment
    sys.argv[1:] = arguments
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


run(**request)  # noqa: F821 - runpy sets it
