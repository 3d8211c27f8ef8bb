"""Who fills a store: the YAML of ``--cluster``, and the file of the process that drives."""

from typing import Any, Literal

from pydantic import Field, model_validator

from .contract import Contract


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
