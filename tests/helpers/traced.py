"""What a recorder has kept, as a trace that can be asked in SQL."""

import sqlite3
from pathlib import Path
from typing import Any

from pdjax.host.metrics.recorder import Recorder
from pdjax.host.metrics.trace import write_trace
from tests.helpers.trace_reader import read_trace

FLOWS_BY_KIND = """
    select count(*) from flow
    join slice a on flow.slice_out = a.id join slice b on flow.slice_in = b.id
    where a.name like ? and b.name like ?
"""
"""Flows from slices of one name to slices of another; both may be patterns."""


def traced(recorder: Recorder, folder: Path) -> sqlite3.Connection:
    write_trace(folder / "trace.json", recorder)
    return read_trace(folder / "trace.json")


def one(tables: sqlite3.Connection, query: str, *values: Any) -> Any:
    [[value]] = tables.execute(query, values).fetchall()
    return value
