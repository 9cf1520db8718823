"""Values that are computed once for all who ask within a moment."""

import asyncio

import pytest

from pdjax.serving import briefly_kept
from pdjax.serving.briefly_kept import BrieflyKept


def test_all_who_come_within_a_moment_get_one_value(monkeypatch: pytest.MonkeyPatch):
    made = list[int]()

    async def compute() -> int:
        made.append(len(made))
        await asyncio.sleep(0)
        if len(made) == 2:
            raise OSError("no value")
        return made[-1]

    async def ask() -> None:
        kept = BrieflyKept(compute)
        monkeypatch.setattr(briefly_kept, "KEPT_S", 1e6)
        leaves = asyncio.ensure_future(kept())
        others = [asyncio.ensure_future(kept()) for _ in range(3)]
        await asyncio.sleep(0)
        leaves.cancel()  # the others get it all the same
        assert await asyncio.gather(*others) == [0, 0, 0] and await kept() == 0
        kept = BrieflyKept(compute)
        monkeypatch.setattr(briefly_kept, "KEPT_S", 0.0)
        with pytest.raises(OSError, match="no value"):
            await kept()
        assert [await kept(), await kept()] == [2, 3]

    asyncio.run(ask())
    assert made == [0, 1, 2, 3]
