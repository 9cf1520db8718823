"""What goes through the door is plain data: it crosses into a process without JAX, and back."""

import dataclasses
import inspect
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pdjax.core.ids import EngineId, PoolId
from pdjax.core.kv_layout import KVLayout
from pdjax.interfaces import batches, events, steps, transport
from pdjax.interfaces.batches import (
    DecodeBatch,
    Masks,
    PrefillBatch,
    Sampled,
    SamplingBatch,
    ScoreBatch,
    Scores,
)
from pdjax.interfaces.steps import DecodeStep, MixedStep, PrefillStep
from pdjax.interfaces.transport import Pool, TransferCost, TransferJob

ROOT = Path(__file__).resolve().parents[2]

ECHO = """
import pickle, sys
sent = pickle.load(sys.stdin.buffer)
assert "jax" not in sys.modules, "plain data needs no JAX"
pickle.dump(sent, sys.stdout.buffer)
"""


def arrays(kind: type) -> dict[str, Any]:
    """An array for each field."""
    return {
        each.name: np.arange(3, dtype=np.int32) + i
        for i, each in enumerate(dataclasses.fields(kind))
    }


def everything() -> list[Any]:
    sampling = SamplingBatch(**arrays(SamplingBatch))
    scored = ScoreBatch(**arrays(ScoreBatch))
    prefill = PrefillBatch(**arrays(PrefillBatch) | {"sampling": sampling, "scored": scored})
    decode = DecodeBatch(
        **arrays(DecodeBatch) | {"tick": 7, "sampling": sampling, "masks": Masks(**arrays(Masks))}
    )
    job = TransferJob(
        3, PoolId("hbm/prefill-0"), PoolId("disk/0"), range(2, 5), np.array([4, 0], np.int32), 1
    )
    engine = EngineId("decode/1")
    return [
        PrefillStep(prefill, exports=((job,), ())),
        PrefillStep(dataclasses.replace(prefill, history=None, scored=None)),
        DecodeStep(decode),
        MixedStep(prefill, decode),
        Pool(PoolId("host/0"), KVLayout.of_heads(2, 1, 8, 16, "float32", 4), 9),
        TransferCost(bytes=1, pages=2, pieces=3, puts=4, layout_changing_puts=0),
        Sampled(**arrays(Sampled) | {"scores": Scores(**arrays(Scores))}),
        *(events.StepDone(engine), events.EngineLost(engine, 2), events.TimerDue(("deadline", 3))),
        *(events.JobRead(3), events.JobArrived(3), events.JobWritten(3)),
    ]


def same(ours: Any, theirs: Any) -> bool:
    """Whether two trees of plain data are equal, types and arrays included."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, np.ndarray):
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    if dataclasses.is_dataclass(ours):
        return all(same(x, vars(theirs)[name]) for name, x in vars(ours).items())
    if isinstance(ours, tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def test_plain_data_crosses_to_another_process_and_back():
    sent = everything()
    ran = subprocess.run(
        [sys.executable, "-c", ECHO], input=pickle.dumps(sent), capture_output=True, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr.decode()
    for ours, theirs in zip(sent, pickle.loads(ran.stdout), strict=True):
        assert same(ours, theirs), ours
    assert sent[0].kind is pickle.loads(ran.stdout)[0].kind
    assert not same(sent[0], sent[1])


def test_no_kind_of_data_is_left_out():
    found: set[type] = set()

    def visit(x: Any) -> None:
        found.add(type(x))
        for part in vars(x).values() if dataclasses.is_dataclass(x) else ():
            visit(part)
        for part in x if isinstance(x, tuple) else ():
            visit(part)

    for each in everything():
        visit(each)
    for module in (batches, steps, transport, events):
        for name, kind in inspect.getmembers(module, dataclasses.is_dataclass):
            assert kind in found, name
