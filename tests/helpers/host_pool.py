"""A made-up kind of pool: pages in arrays of numpy, which no engine has. What a kind of pool costs
is this file: the pool, and the transport that moves pages into it and out of it.

It is as slow as it is simple: every call waits for the device.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from pdjax.core.ids import PoolId
from pdjax.core.kv_layout import KVPlane
from pdjax.device.kv.pool import PoolOwner
from pdjax.device.worker import Done
from pdjax.interfaces.transport import Pool, TransferCost, TransferJob

Tokens = list[list[np.ndarray]]
"""Of each layer, of each of its planes: [K, T, H]."""


class Pages(Protocol):
    """The pages of a pool, as this transport reads and writes them."""

    def read(self, layers: range, pages: np.ndarray) -> Tokens: ...

    def write(self, layers: range, pages: np.ndarray, tokens: Tokens) -> None: ...


class HostPool:
    """Pages in host memory: of each layer, of each of its planes, [K, P, S, H]."""

    def __init__(self, pool: Pool, dtype: str | None = None) -> None:
        self.id, layout = pool.id, pool.layout
        self._pages = [
            [
                np.zeros((plane.heads, pool.num_pages, layout.page_size, plane.dim), dtype)
                for plane in planes
            ]
            for planes in layout.planes
        ]

    def read(self, layers: range, pages: np.ndarray) -> Tokens:
        return [
            [whole[:, pages].reshape(len(whole), -1, whole.shape[-1]) for whole in self._pages[i]]
            for i in layers
        ]

    def write(self, layers: range, pages: np.ndarray, tokens: Tokens) -> None:
        for layer, planes in zip(layers, tokens, strict=True):
            for whole, new in zip(self._pages[layer], planes, strict=True):
                whole[:, pages] = new.reshape(len(whole), len(pages), -1, whole.shape[-1])


class DevicePages:
    """The pages of a pool on devices."""

    def __init__(self, owner: PoolOwner) -> None:
        self._layout, self._owner = owner.layout, owner

    def _rows(self, layer: int, plane: KVPlane) -> tuple[int, slice]:
        """The slot of a layer, and the rows of its stage in the arrays of that."""
        for stage, own in enumerate(self._layout.stage_layers):
            if layer in own:
                return own.index(layer), slice(stage * plane.heads, (stage + 1) * plane.heads)
        raise AssertionError("every layer is on a stage")

    def read(self, layers: range, pages: np.ndarray) -> Tokens:
        tokens: Tokens = []
        for layer in layers:
            tokens.append([])
            for place, plane in enumerate(self._layout.planes[layer]):
                slot, rows = self._rows(layer, plane)
                found = np.asarray(self._owner.arrays[slot][place])[rows, pages]
                tokens[-1].append(found.reshape(plane.heads, -1, plane.dim))
        return tokens

    def write(self, layers: range, pages: np.ndarray, tokens: Tokens) -> None:
        with self._owner.donated():
            for layer, planes in zip(layers, tokens, strict=True):
                for place, plane in enumerate(self._layout.planes[layer]):
                    slot, rows = self._rows(layer, plane)
                    every: list[Any] = list(self._owner.arrays[slot])
                    whole = np.array(every[place])
                    whole[rows, pages] = planes[place].reshape(
                        plane.heads, len(pages), -1, plane.dim
                    )
                    every[place] = jax.device_put(whole, every[place].sharding)
                    self._owner.replace(range(slot, slot + 1), [tuple(every)])


class Arrived(Done[TransferCost]):
    """A job that has been read, and has arrived."""

    def __init__(self, job: TransferJob, tokens: Tokens) -> None:
        arrays = [each for planes in tokens for each in planes]
        nbytes = sum(each.nbytes for each in arrays)
        super().__init__(TransferCost(nbytes, job.pages * len(job.layers), len(arrays), 0, 0))
        self.job, self.tokens, self.read = job, tokens, Done(None)


class HostTransport:
    """Moves pages between pools of engines and those in host memory; see `interfaces.Transport`."""

    def __init__(self, engines: Mapping[PoolId, Pages], *pools: HostPool) -> None:
        self._engines, self._hosts = engines, {each.id: each for each in pools}
        self._pages: dict[PoolId, Pages] = {**engines, **self._hosts}
        self._arrived: dict[int, Arrived] = {}

    def connects(self, source: PoolId, target: PoolId) -> bool:
        ends = {source, target}
        return len(ends & self._engines.keys()) == len(ends & self._hosts.keys()) == 1

    def writes_ahead(self, source: PoolId, target: PoolId) -> bool:
        return False

    def compile(self, job: TransferJob, target_pages: np.ndarray) -> Done[None]:
        return Done(None)

    def send(self, job: TransferJob) -> Arrived:
        tokens = self._pages[job.source].read(job.layers, job.source_pages)
        self._arrived[job.id] = Arrived(job, tokens)
        return self._arrived[job.id]

    def write(self, job_id: int, target_pages: np.ndarray) -> Done[int]:
        arrived = self._arrived.pop(job_id, None)
        if arrived is None:
            raise ValueError(f"job_id={job_id}: must be a job in flight")
        job = arrived.job
        self._pages[job.target].write(job.layers, target_pages, arrived.tokens)
        return Done(0)

    def cancel(self, job_id: int) -> None:
        self._arrived.pop(job_id, None)

    def measure(self, source: PoolId, target: PoolId, nbytes: int) -> Done[float]:
        return Done(1e-3 + nbytes / 1e9)

    def close(self) -> None:
        self._arrived.clear()
