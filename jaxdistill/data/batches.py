"""The rows of virtual shards as a Grain data set of batches, with a state that Grain's prefetching keeps exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grain

from jaxdistill.data.packing import RowKind
from jaxdistill.data.shards import VirtualShard


class ShardBatches(grain.IterDataset):
    """Endless batches: `rows_per_shard` rows of each shard in turn, as the fields of `types.Batch`."""

    def __init__(self, shards: Sequence[VirtualShard], *, rows_per_shard: int, kind: RowKind):
        super().__init__()
        self._shards, self._rows_per_shard, self._kind = shards, rows_per_shard, kind

    def __iter__(self) -> grain.DatasetIterator:
        return _ShardBatchIterator(self._shards, self._rows_per_shard, self._kind)


class _ShardBatchIterator(grain.DatasetIterator):
    def __init__(self, shards: Sequence[VirtualShard], rows_per_shard: int, kind: RowKind):
        super().__init__()
        self._shards, self._rows_per_shard, self._kind = shards, rows_per_shard, kind

    def __next__(self) -> dict[str, Any]:
        rows = [shard.next_row() for shard in self._shards for _ in range(self._rows_per_shard)]
        return self._kind.arrays(rows)

    def get_state(self) -> dict[str, Any]:
        return {"shards": [shard.state() for shard in self._shards]}

    def set_state(self, state: dict[str, Any]) -> None:
        for shard, place in zip(self._shards, state["shards"], strict=True):
            shard.restore(place)


def prefetched(batches: ShardBatches, count: int) -> grain.DatasetIterator:
    """An iterator whose batches are made ahead in a thread; its state is that of the last batch taken."""
    return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=count))
