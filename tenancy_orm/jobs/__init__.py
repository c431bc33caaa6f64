"""Jobs: work that one process at a time does, whichever process claims it."""

from .claims import CLAIM_SECONDS, Claimant, keep_claims

__all__ = ["CLAIM_SECONDS", "Claimant", "keep_claims"]
