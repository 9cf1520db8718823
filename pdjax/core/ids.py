"""Names of what a deployment is made of. They are plain strings, since the host looks them up with
every event."""

from typing import NewType

EngineId = NewType("EngineId", str)
"""An engine, such as "prefill/0"."""

PoolId = NewType("PoolId", str)
"""A pool of pages, such as "hbm/prefill-0". An engine has a pool; engines may share one; a pool
need not have an engine."""
