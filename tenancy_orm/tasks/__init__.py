"""What every task queue shares: the header that names the tenant, and the checks on sending and on arrival.

One module of ``tenancy_orm.integrations`` brings it to each queue: ``celery``, ``taskiq``, ``arq``, ``procrastinate``.
"""

from .envelope import HEADER
from .gate import TaskGate
from .needs import needs_no_tenant, needs_tenant
from .policy import ArrivalPolicy, Outcome, Reason

__all__ = ["HEADER", "ArrivalPolicy", "Outcome", "Reason", "TaskGate", "needs_no_tenant", "needs_tenant"]
