"""The Pager: answers what the engine cannot, on one thread, and keeps the image's metadata.

The engine knows offsets and moves bytes; what a table says, which host cluster is free and what
has to be written in which order, the format driver knows.  The Pager stands between them.

Invariants
1. Every fault that wants an answer gets exactly one, whatever is raised meanwhile: an errno where
   the host gave one, else EIO, and a log line with the traceback.
2. The driver is called from one thread: the Pager's, and after it has ended, close()'s.  But
   inflate() runs on workers, so that decoding is parallel and nothing else waits for it.
3. A returned plan is executed to its end before the driver is called again.
4. Nothing is written to the image before begin()'s plan is done.
5. A flush is answered after every mapping that was new when it arrived has been committed and all
   owned files are synced.  Mappings are taken from the engine only once their data is written;
   that the data is durable first is the commit plan's business (Dirty.barrier).
6. Once a plan of begin, commit, discard or end, or any sync, has failed, the image is never
   written again, by the engine neither: what is on disk now is what a crash here would leave.
   Reads go on.  A failed sync may have dropped what was written before it, so it is never retried.
7. A host cluster whose write failed goes back to the driver, which empties it before it hands it
   out again: at once where the host had no space, so that retries do not make the file grow; else
   at the end, because the place itself may be bad.
8. The log needs no file but its own: a traceback is written without source lines, since those
   might have to be read from the disk that waits for us.

States: running; failed (6: reads only); closed.  stop() of the engine may come in any of them.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from virtmount import hostfile
from virtmount.disk import Disk
from virtmount.engine import DIRTY_BATCH, Engine, Fault, FaultType
from virtmount.errors import NoTransport, VirtmountError
from virtmount.fill import Filler
from virtmount.image import Reservation, Run
from virtmount.plan import Barrier, Plan

IDLE_MS = 1000  # how long a new mapping may stay uncommitted when nobody asks for a flush
AHEAD_LOW, AHEAD_HIGH = 16 << 20, 64 << 20  # bytes of host clusters reserved ahead
HURRY = 1.0  # seconds: refills closer than this make the next one larger
DISCARD_BATCH = 1 << 16  # clusters in one discard plan
MAX_PLACES = 256  # remembered as already logged
MAX_WORKERS = 4  # threads that inflate

log = logging.getLogger(__name__)


class Quiet(OSError):
    """For the request only: nothing went wrong that a person should read about."""


class Pager:
    """Runs a disk: the engine's loop on one thread, the miss loop on another.

    Owns the disk from start() on.  `device_gone` is set once the engine has let go of the ublk
    device that it served: the device was stopped and its requests are done, or the engine ended.
    """

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._image = disk.image
        self._files = disk.image.files
        self.device_gone = threading.Event()
        self._filler = Filler(disk, self._complain)
        self.engine: Engine = disk.create_engine()
        self._cluster = disk.image.cluster_size
        self._clusters = -(-disk.size // self._cluster)
        self._begun = False
        self._failed = 0
        self._stopping = False
        self._closed = False
        self._lost: list[Run] = []
        self._full = False  # the last write that failed found no space
        self._places: set[tuple[Any, ...]] = set()
        self._ahead = AHEAD_LOW
        self._refilled = self._committed = time.monotonic()
        self._loop_error: VirtmountError | None = None
        # Started one by one as they are needed: most images are not compressed.
        self._workers = ThreadPoolExecutor(
            min(os.cpu_count() or 1, MAX_WORKERS), thread_name_prefix="virtmount-inflate"
        )
        self._threads = [
            threading.Thread(target=self._run_engine, name="virtmount-engine", daemon=True),
            threading.Thread(target=self._run, name="virtmount-pager", daemon=True),
        ]

    @property
    def failed(self) -> int:
        """The errno of invariant 6, or 0."""
        return self._failed

    def start(self) -> Pager:
        """Returns once requests are served; after an error all is closed."""
        loop, pager = self._threads
        try:
            loop.start()
            self.engine.stats()  # answered once the loop runs, or has failed to
            try:
                self.engine.faults_wait(0)  # there are none yet: nobody has sent a request
            except OSError:
                loop.join()
            if self._loop_error is not None:
                raise self._loop_error
            pager.start()
        except BaseException:
            self.close()
            raise
        return self

    def stop(self) -> None:
        """Let the engine end: requests under way end or fail with ESHUTDOWN.  Any thread."""
        self._stopping = True
        self.engine.stop()

    def close(self) -> None:
        """Orderly end: everything durable, clean flags, no leaks; then engine and files are closed.

        Nobody may send requests any more.  Raises the error that kept the image from being
        finished, after all is closed; the image then is as after a crash.  Harmless when repeated.
        """
        if self._closed:
            return
        self._closed = True
        started = [thread for thread in self._threads if thread.ident is not None]
        if started:
            self.stop()
        for thread in started:
            thread.join()
        self._workers.shutdown()
        try:
            if self._begun:
                self._finish()
        finally:
            self.engine.close()
            self.disk.close()

    def _finish(self) -> None:
        self._refuse_failed()
        self._flush()
        try:
            self._image.release(self.engine.pool_take() + self._lost)
            hostfile.execute(self._image.end(), self._files)
            hostfile.sync_all(self._files)
        except BaseException as error:
            self._fail(error)
            raise

    # Threads

    def _run_engine(self) -> None:
        try:
            self.engine.run()
        except OSError as error:
            self._loop_error = NoTransport(
                self._files[0],
                "",
                f"io_uring: {error.strerror}",
                hint="sysctl kernel.io_uring_disabled=0",
            )

    def _run(self) -> None:
        try:
            while True:
                self._handle(self.engine.faults_wait(self._patience()))
                self._commit_old()
        except BaseException as error:
            if not isinstance(error, OSError) or error.errno != errno.ESHUTDOWN:
                self._die(error)
        finally:
            self._threads[0].join()  # which closes the device's descriptor
            self.device_gone.set()

    def _die(self, error: BaseException) -> None:
        """No one is left to answer: requests must fail rather than hang."""
        self._complain(error)
        self.engine.stop()

    def _patience(self) -> int:
        # Without a map nothing can be dirty, and before the first write neither.
        if not self._begun or self.disk.flat is not None or self._failed:
            return -1
        return IDLE_MS

    # Faults

    def _handle(self, faults: Sequence[Fault]) -> None:
        """Answer a batch: reads first, they are short; flushes last, all with one commit."""
        flushes = [fault for fault in faults if fault.type is FaultType.FLUSH]
        rest = [fault for fault in faults if fault.type is not FaultType.FLUSH]
        for fault in sorted(rest, key=lambda fault: fault.type):
            match fault.type:
                case FaultType.FILL:
                    self._fill(fault)
                case FaultType.INFLATE:
                    self._workers.submit(self._inflate, fault)
                case FaultType.REFILL:
                    self._answer(fault, functools.partial(self._refill, fault.arg, fault.offset))
                case FaultType.BEGIN:
                    self._answer(fault, self._begin)
                case FaultType.DISCARD | FaultType.ZERO:
                    act = functools.partial(self._discard, fault.offset, fault.length)
                    self._answer(fault, act)
                case FaultType.FAILED:
                    self._full = fault.arg in (errno.ENOSPC, errno.EDQUOT)
                    if self._first(FaultType.FAILED, fault.arg):
                        text = "%s: %s, writing or syncing the image for guest byte %d"
                        log.error(text, self._files[0], os.strerror(fault.arg), fault.offset)
                case FaultType.LOST:
                    self._lose(Run(fault.offset, fault.length // self._cluster, fault.arg))
                case FaultType.DEVICE:
                    self.device_gone.set()
        if flushes:
            error = self._attempt(self._flush)
            for fault in flushes:
                self.engine.answer(fault.id, error)

    def _answer(self, fault: Fault, act: Callable[[], object]) -> None:
        self.engine.answer(fault.id, self._attempt(act))

    def _attempt(self, act: Callable[[], object]) -> int:
        """0, or the -errno for the requests that wait."""
        try:
            act()
        except Quiet as error:
            return -errno_of(error)
        except BaseException as error:
            self._complain(error)
            return -errno_of(error)
        return 0

    def _fill(self, fault: Fault) -> None:
        try:
            entries = self._filler.leaf(fault.offset)
        except BaseException as error:
            self._complain(error)
            self.engine.fill(fault.id, None, -errno_of(error))
        else:
            self.engine.fill(fault.id, entries)

    def _inflate(self, fault: Fault) -> None:
        """On a worker.  The engine hears of errors only where it still finds the cluster packed."""
        try:
            image = self.disk.layers[fault.arg]
            cluster = fault.offset // image.cluster_size
            data = image.inflate(cluster)
            if len(data) != image.cluster_size:
                raise ValueError(f"inflate({cluster}): {len(data)} bytes")
        except BaseException as error:
            self._complain(error)
            data, start, code = b"", fault.offset, -errno_of(error)
        else:
            start, code = cluster * image.cluster_size, 0
        with contextlib.suppress(OSError):  # the loop has ended, and with it who asked
            self.engine.inflated(fault.id, start, data, code)

    # Writing

    def _begin(self) -> None:
        self._refuse_failed()
        if not self._begun:
            with self._failing():
                hostfile.execute(self._image.begin(), self._files, self.engine.drain)
            self._begun = True

    def _refill(self, asked: int, guest_offset: int) -> None:
        self._refuse_failed()
        if self._stopping:  # what is reserved now might not come back in time to be released
            raise Quiet(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))
        self._begin()
        try:
            reservation = self._reserve(self._wanted(asked), guest_offset)
        except OSError as error:
            # Often harmless: there may be no unmapped cluster left that would need one.
            log.info("%s: no host clusters: %s", self._files[0], error)
            raise Quiet(error.errno, error.strerror) from error
        except BaseException as error:
            self._fail(error)
            raise
        try:
            self._extend(reservation.plan)
        except OSError:
            self._image.release(reservation.runs)
            raise
        if not any(run.count > 0 for run in reservation.runs):
            raise OSError(errno.ENOSPC, f"{self._image.name}: reserved nothing")
        for run in reservation.runs:
            if self._filler.is_metadata(run.host_offset, run.count * self._cluster, run.file):
                with self._failing():
                    raise ValueError(f"{self._image.name}: reserved its own metadata, {run}")
            self.engine.pool_add(run, reused=reservation.reused)

    def _reserve(self, count: int, guest_offset: int) -> Reservation:
        if self._image.zones:
            return self._image.reserve_at(count, guest_offset)
        return self._image.reserve(count)

    def _wanted(self, asked: int) -> int:
        """How many clusters to reserve: enough that a sequential writer need not wait for us."""
        now = time.monotonic()
        hurry = now - self._refilled < HURRY
        self._ahead = min(self._ahead * 2, AHEAD_HIGH) if hurry else AHEAD_LOW
        self._refilled = now
        if self._cluster >= AHEAD_LOW and not hurry:
            return max(asked, 1)  # a whole large cluster for what may be one small write
        return max(asked, 1, min(self._ahead // self._cluster, self._clusters))

    def _extend(self, plan: Plan) -> None:
        """Execute a reserve plan.  It maps nothing, so only a failed sync harms the image."""
        steps: list[Any] = []
        for step in plan:
            if step is not Barrier:
                steps.append(step)
                continue
            hostfile.execute(Plan(*steps), self._files, self.engine.drain)
            steps.clear()
            with self._failing():
                hostfile.sync_all(self._files)
        hostfile.execute(Plan(*steps), self._files, self.engine.drain)

    def _lose(self, run: Run) -> None:
        if self._image.identity_file is not None:
            return  # its place is taken whatever it holds
        if self._full and not self._failed:
            with self._failing():
                self._image.release([run])
        else:
            self._lost.append(run)

    def _flush(self) -> None:
        """Make durable what was acknowledged up to now."""
        if not self._commit():
            with self._failing():
                hostfile.sync_all(self._files)

    def _commit(self) -> bool:
        """Commit all new mappings; True if that synced the files too, at the very end."""
        self._refuse_failed()
        self._committed = time.monotonic()
        synced = False
        while dirty := self.engine.dirty_take():
            try:
                with self._failing():
                    plan = self._image.commit(dirty)
                    hostfile.execute(plan, self._files, self.engine.drain)
            except BaseException as error:
                self.engine.dirty_done(-errno_of(error))
                raise
            self.engine.dirty_done()
            synced = Barrier in plan.steps
            if len(dirty) < DIRTY_BATCH:
                break
        return synced

    def _commit_old(self) -> None:
        """Between flushes too, so that a killed daemon loses little and leaves can be dropped."""
        if self._patience() < 0 or time.monotonic() - self._committed < IDLE_MS / 1000:
            return
        self._committed = time.monotonic()
        if self.engine.stats()["dirty"]:
            self._attempt(self._commit)

    def _discard(self, offset: int, length: int) -> None:
        self._begin()
        self._commit()
        first, end = offset // self._cluster, -(-(offset + length) // self._cluster)
        while first < end:
            count = min(end - first, DISCARD_BATCH)
            with self._failing():
                plan = self._image.discard(first, count)
                hostfile.execute(plan, self._files, self.engine.drain)
            first += count

    # Failure

    @contextlib.contextmanager
    def _failing(self) -> Any:
        """An exception in here is the end of writing (invariant 6)."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        if not self._failed:
            self._failed = errno_of(error)
            log.error("%s: no more writes: %s", self._files[0], error)
            self.engine.set_failed(-self._failed)

    def _refuse_failed(self) -> None:
        if not self._failed:
            # Where nothing is dirty the engine syncs without us.
            self._failed = -self.engine.stats()["failed"]
        if self._failed:
            raise Quiet(self._failed, os.strerror(self._failed), str(self._files[0]))

    def _complain(self, error: BaseException) -> None:
        """Log an error, but each place only once: a bad sector is asked for again and again."""
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = (frame.tb_frame.f_code.co_filename, frame.tb_lineno) if frame else ()
        place = (type(error), getattr(error, "place", getattr(error, "errno", None)), *where)
        if self._first(*place):
            if isinstance(error, VirtmountError):
                log.error("%s", error)  # names the file itself
            else:
                log.error("%s: %s%s", self._files[0], error, trail(error))

    def _first(self, *place: Any) -> bool:
        if place in self._places or len(self._places) >= MAX_PLACES:
            return False
        self._places.add(place)
        return True


def errno_of(error: BaseException) -> int:
    """What a request fails with: the host's errno, or EIO for everything else."""
    if isinstance(error, OSError) and error.errno and 0 < error.errno < 4096:
        return error.errno
    return errno.ENOMEM if isinstance(error, MemoryError) else errno.EIO


def trail(error: BaseException) -> str:
    """The traceback in one line (invariant 8)."""
    frames = [
        f"{frame.f_code.co_filename}:{line} {frame.f_code.co_name}"
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    return f" ({type(error).__name__}; {' > '.join(frames)})"
