"""The windows of one file scored by actors of a Ray cluster: `--engine ray`.

One task on this machine reads the file, a pool of actors with a copy of the model each scores the windows, and this
process writes them in order. Only this machine needs the file. Ray starts an actor anew that ends, and has what it was
doing done again.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator
from typing import Any

from btrm_core.data import Naming
from btrm_core.errors import ConfigError
from btrm_core.scoring.bulk.windows import Finished, Windows, finished_window, groups_of, records_of

EXTRA = "--engine ray needs Ray; install it with `pip install 'btrm[ray]'`"
BLOCK_BYTES = 1
"""So that every window is a block of its own, and goes to an actor of its own."""


class RayWorkers:
    """Actors of a Ray cluster with a copy of a model each; to be used in a `with` statement.

    Joins the cluster that RAY_ADDRESS names or that runs on this machine, else starts one of this machine alone.

    Args:
        model: as for `Scorer`; a directory must be there on every machine.
        count: actors.
        gpus: whether each has a GPU.
        options: keywords of `Scorer`.

    Raises:
        ConfigError: Ray is not installed.
        BtrmError: as `Scorer`.

    Attributes:
        identity: the model's; see `Scorer`.
        tokens_per_batch: tokens of a row.
    """

    def __init__(self, model: str, count: int, *, gpus: bool = False, **options: Any) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ConfigError(EXTRA) from error
        self._ours = not ray.is_initialized()
        if self._ours:
            _join_cluster(count)
        self._count, self._gpus = count, gpus
        self._told = {"model": model, "options": options}
        try:
            about = ray.remote(num_gpus=int(gpus))(_identity)
            self.identity, self.tokens_per_batch = ray.get(about.remote(model, options))
        except ray.exceptions.RayTaskError as error:
            self.close()
            raise error.cause from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster, or end it if it is this object's own."""
        import ray

        if self._ours:
            ray.shutdown()

    def finished(self, windows: Windows) -> Iterator[Finished]:
        """Yield every window with its rewards, in order.

        Args:
            windows: of a file.

        Raises:
            BtrmError: as `Scorer` does, and as reading does.
        """
        import ray

        found = self._data(windows)
        try:
            for batch in found.iter_batches(batch_size=None, prefetch_batches=1, batch_format="pandas"):
                yield from (pickle.loads(one) for one in batch["finished"])
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            while isinstance(cause, ray.exceptions.RayError) and getattr(cause, "cause", None) is not None:
                cause = cause.cause
            raise cause from None

    def _data(self, windows: Windows) -> Any:
        """The data set that Ray computes while it is read."""
        import ray

        context = ray.data.DataContext.get_current()
        context.target_max_block_size = BLOCK_BYTES
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        read = ray.data.read_datasource(
            _source(windows), override_num_blocks=1, ray_remote_args={"scheduling_strategy": here, "num_cpus": 0.01}
        )
        return read.map_batches(
            _Scoring,
            fn_constructor_kwargs={**self._told, "naming": windows.naming},
            batch_size=None,
            batch_format="pandas",
            compute=ray.data.ActorPoolStrategy(size=self._count),
            num_cpus=1,
            num_gpus=int(self._gpus),
        )


def _join_cluster(count: int) -> None:
    import ray

    about = {"log_to_driver": False, "include_dashboard": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="ERROR")
        return
    ray.init(num_cpus=count + 1, **about)


def _identity(model: str, options: dict[str, Any]) -> tuple[str, int]:
    from btrm_core.scoring.scorer import Scorer

    scorer = Scorer(model, **options)
    return scorer.identity, scorer.tokens_per_batch


class _Scoring:
    """What an actor does with blocks of windows."""

    def __init__(self, model: str, options: dict[str, Any], naming: Naming) -> None:
        from btrm_core.scoring.scorer import Scorer

        self._scorer, self._naming = Scorer(model, **options), naming

    def __call__(self, block: Any) -> dict[str, list[bytes]]:
        """Return the windows of a block with their rewards."""
        return {"finished": [pickle.dumps(self._scored(pickle.loads(one))) for one in block["window"]]}

    def _scored(self, window: Any) -> Finished:
        records = records_of(window, self._naming)
        return finished_window(window, records, self._scorer.score(groups_of(records)))


def _source(windows: Windows) -> Any:
    """The file as something that Ray reads, by one task, a window at a time."""
    import pyarrow
    import ray

    def blocks() -> Iterable[pyarrow.Table]:
        for window in windows:
            yield pyarrow.table({"window": pyarrow.array([pickle.dumps(window)], pyarrow.large_binary())})

    class Source(ray.data.Datasource):  # type: ignore[misc]
        def estimate_inmemory_data_size(self) -> int:
            return windows.path.stat().st_size

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            about = ray.data.block.BlockMetadata(
                num_rows=None, size_bytes=self.estimate_inmemory_data_size(), input_files=None, exec_stats=None
            )
            return [ray.data.ReadTask(blocks, about)]

    return Source()
