"""Jobs: work that one process at a time does, whichever process claims it."""

from .claims import CLAIM_SECONDS, Claimant, keep_claims
from .manager import ClaimedJob, Job, JobResult, Jobs, JobStatus

__all__ = ["CLAIM_SECONDS", "Claimant", "ClaimedJob", "Job", "JobResult", "JobStatus", "Jobs", "keep_claims"]
