"""Who fills a store: the YAML of ``--cluster``, and the file of the process that drives."""

from typing import Any, Literal

from pydantic import Field, model_validator

from .contract import Contract

DRIVER = "driver.json"
"""In a store that is being filled."""


class JobQueue(Contract):
    """A cluster that dask-jobqueue starts as jobs, as many as there is work for."""

    kind: Literal["slurm", "pbs", "sge", "lsf", "oar", "htcondor", "moab", "local"]
    """The batch system; ``local`` starts processes of this machine as if they were jobs."""
    minimum_jobs: int = Field(1, ge=1)
    """Jobs that are kept, work or not: of the first is asked what workers are like, and it is not
    given back while captions are planned."""
    maximum_jobs: int = Field(ge=1)
    """Jobs at most."""
    lifetime_margin_minutes: float = Field(10.0, ge=0)
    """Workers end so long before their job's walltime, or the batch system kills them at work."""
    options: dict[str, Any]
    """Arguments of dask-jobqueue's cluster: ``cores``, ``memory``, ``queue``, ``walltime``,
    ``job_extra_directives`` and others."""

    @model_validator(mode="after")
    def _check(self) -> "JobQueue":
        if self.minimum_jobs > self.maximum_jobs:
            raise ValueError(
                f"minimum_jobs {self.minimum_jobs} is more than maximum_jobs {self.maximum_jobs}"
            )
        return self


class Driver(Contract):
    """``driver.json``: the process that is filling a store, or training a run."""

    host: str
    pid: int
    begun: str
    """When the process began, as its machine counts; with the pid it names it for good."""
    started: str
    """When it took the lock, UTC."""
    token: str
    """Random, by which it knows its own file."""
    beats: int = 0
    """In an object store: how often it has put the file anew, to show that it lives."""
