"""The YAML file of ``--cluster``."""

from typing import Any, Literal

from pydantic import Field, model_validator

from .contract import Settings


class JobQueue(Settings):
    """A cluster that dask-jobqueue starts as jobs of a batch system, as many as the work needs."""

    kind: Literal["slurm", "pbs", "sge", "lsf", "oar", "htcondor", "moab", "local"]
    """The batch system; ``local`` starts processes on this machine as if they were jobs."""
    minimum_jobs: int = Field(1, ge=1)
    """Jobs that are kept even without work. The first one is asked about the workers, and is not
    given back while captions are planned."""
    maximum_jobs: int = Field(ge=1)
    """Upper limit of the number of jobs."""
    lifetime_margin_minutes: float = Field(10.0, ge=0)
    """Time for shards at work: workers take no others this long before their job's walltime."""
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
