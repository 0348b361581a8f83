"""Several processes that carry out one plan together: each merges its share, one failure ends all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

# Milliseconds between two looks at whether another process has failed.
_LOOK = 500
# A process that says nothing any more, as it was killed, is given up after so many seconds.
_SILENCE = 60


class OtherProcessError(ConnectionError):
    """Another process of the same run has failed; its own message says why."""


class Processes:
    """This process among those that run one plan.

    Args:
        index: its number, from 0. The first one makes the output's place and completes the output.
        count: how many there are.
        client: of JAX's coordination service; None for one process alone.

    Attributes:
        index: as given.
        count: as given.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None) -> None:
        self.index = index
        self.count = count
        self._client = client
        self._stages = 0

    def meet(self, text: str = "") -> list[str]:
        """Waits until all processes have come here; all come to the same places in one order.

        Args:
            text: what this process tells the others.

        Returns:
            What each process tells, by its number.

        Raises:
            OtherProcessError: a process has failed.
        """
        if self._client is None:
            return [text]
        self._stages += 1
        self._client.key_value_set(f"jaxmerge/{self._stages}/{self.index}", text)
        return [self._told(f"jaxmerge/{self._stages}/{index}") for index in range(self.count)]

    def check(self) -> None:
        """Looks whether all processes are well.

        Raises:
            OtherProcessError: a process has failed.
        """
        if self._client is None:
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            failed = self._client.key_value_try_get("jaxmerge/failed")
            raise OtherProcessError(f"process {failed} of {self.count} has failed; see its output")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Tells the other processes of an error that ends this one."""
        try:
            yield
        except OtherProcessError:
            raise
        except BaseException:
            if self._client is not None:
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    self._client.key_value_set("jaxmerge/failed", str(self.index))
            raise

    def _told(self, key: str) -> str:
        while True:
            try:
                return str(self._client.blocking_key_value_get(key, _LOOK))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise OtherProcessError(f"the other processes are gone: {error}") from None
                self.check()
                time.sleep(0)


ALONE = Processes()


def connect(
    coordinator: str | None = None, process_id: int | None = None, num_processes: int | None = None
) -> Processes:
    """Joins the processes of a run; called before JAX computes anything.

    Args:
        coordinator: address and port of the first process, as "10.0.0.1:1234". With None JAX finds the
            cluster (Slurm, TPU pods, Open MPI and others).
        process_id: the number of this process, from 0.
        num_processes: how many there are.

    Raises:
        ValueError: there is no cluster, or only some of the arguments are given.
    """
    # The key-value store has no public name in JAX; orbax uses it in the same way.
    from jax._src import distributed

    try:
        jax.distributed.initialize(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            heartbeat_timeout_seconds=_SILENCE,
            shutdown_timeout_seconds=_SILENCE,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"cannot join the other processes: {error} Give all of --coordinator, --process-id and "
            "--num-processes, or run under a cluster that JAX knows"
        ) from None
    state = distributed.global_state
    return Processes(state.process_id, state.num_processes or 1, state.client)
