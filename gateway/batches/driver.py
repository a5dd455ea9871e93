"""One batch, led from state to state: read, run, and written down.

Every step begins from what is durable and ends in it, so that another process can go on wherever this one has stopped.
A step that was done and not noted is done again, and comes to the same: the run of a batch is submitted under a key of
its own, and the files of its results have ids that are the batch's.
"""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from core.batches import OPEN, BatchRecord, BatchState, FileRecord, RowError
from core.chat import Endpoint
from core.clock import Clock
from core.errors import ForebayError, Unavailable
from core.workflows import RunEvent
from gateway.auth import Principal
from gateway.batches.results import EXPIRED, line_of
from gateway.batches.rows import InvalidRows, Plan, read
from gateway.batches.sheet import Sheet
from gateway.runs.history import HAPPENING, Settled
from gateway.runs.live import LiveRun
from gateway.runs.service import Runs
from semantic_vars.calls import Workflow
from semantic_vars.variable import State
from storage.sql.batches import Batches, Progress
from storage.sql.database import Conflict, Missing, StorageUnavailable
from storage.sql.files import Files

_log = structlog.get_logger(__name__)

RETRY_S = 1.0
_LEAST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_PAGE = 100  # events, each of which may be megabytes
LONGEST_WINDOW_S = 86_400.0  # of a run
_FORGOTTEN = RowError(
    "run_not_found", "the run was forgotten before its results were written: `workflows.retention` is shorter than that"
)
_UNDER_WAY: tuple[BatchState, ...] = ("in_progress", "cancelling")


class Tally:
    """Counts what has become of the rows of a run, event by event."""

    def __init__(self, rows: Mapping[str, Any]) -> None:
        self._rows = rows
        self.number = 0
        self.settled = self.completed = self.failed = 0
        self.has_expired = self.has_cancelled = False

    def add(self, event: RunEvent) -> Settled | None:
        """Take the next event; return it if a row has its outcome by it."""
        self.number = event.number
        told = HAPPENING.decode(event.body)
        if not isinstance(told, Settled) or told.variable not in self._rows:
            return None
        self.settled += 1
        state, failure = told.outcome.state, told.outcome.failure
        self.completed += state is State.DONE
        self.failed += state is State.FAILED
        self.has_cancelled |= state is State.CANCELLED
        self.has_expired |= failure is not None and failure.code == EXPIRED
        return told

    @property
    def counts(self) -> dict[str, int]:
        """The counts, as fields of the batch's record."""
        return {"completed": self.completed, "failed": self.failed}


class Driver:
    """Leads one batch, as long as it is this gateway's. ``principal_of`` returns who a key's id is, and raises
    ``ForebayError`` for one that holds no longer."""

    def __init__(
        self,
        record: BatchRecord,
        *,
        store: Batches,
        files: Files,
        runs: Runs,
        principal_of: Callable[[str], Principal],
        clock: Clock,
    ) -> None:
        self._id = record.id
        self._record = record
        self._store = store
        self._files = files
        self._runs = runs
        self._principal_of = principal_of
        self._clock = clock
        self._owner = record.owner
        self._plan: Plan | None = None
        self._tally: Tally | None = None
        self._pause_s = _LEAST_PAUSE_S
        self._woken = asyncio.Event()
        self._fault = ""

    @property
    def counts(self) -> Mapping[str, int]:
        """What has become of the rows so far, as fields of the record; nothing while that is not known."""
        return self._tally.counts if self._tally is not None else {}

    def wake(self) -> None:
        """Look at the batch soon: it was changed beside this."""
        self._woken.set()

    async def drive(self) -> None:
        """Return when the batch has ended, or is no longer this gateway's. Never raises, but for being cancelled."""
        following: BatchRecord | None = self._record
        while following is not None and following.state in OPEN:
            record = following
            try:
                following = await self._step(record)
            except (StorageUnavailable, Unavailable) as error:
                following = await self._later(record, error)
            except (Conflict, Missing):
                return  # erased, or another gateway's: whoever has it goes on
            except Exception:  # noqa: BLE001 - the border of a batch: whoever waits for it has to be told
                _log.exception("batch_failed", batch=self._id)
                if record.run is not None:
                    await self._cancel(record, record.run)
                following = await self._give_up([RowError("internal", "an internal error; the log has the details")])

    async def _later(self, record: BatchRecord, why: Exception) -> BatchRecord | None:
        """Wait a little, and return the batch as it is then."""
        if str(why) != self._fault:
            _log.info("batch_waits", batch=self._id, error=str(why))
        self._fault = str(why)
        await self._pause(RETRY_S)
        try:
            return await self._ours()
        except StorageUnavailable:
            return record

    async def _ours(self) -> BatchRecord | None:
        found = await self._store.batch(self._id)
        return found if found is not None and found.owner == self._owner else None

    async def _step(self, record: BatchRecord) -> BatchRecord | None:
        """Do what comes next; return the batch as it is then, or None where it is no longer ours."""
        match record.state:
            case "validating":
                return await self._validate(record)
            case "finalizing":
                return await self._finalize(record)
            case "cancelling" if not record.total:
                return await self._change({"state": "cancelled", "ended_at": self._clock.wall()}, ("cancelling",))
            case _ if record.run is None:
                return await self._begin(record)
            case _:
                return await self._watch(record)

    async def _change(self, values: Mapping[str, Any], among: tuple[BatchState, ...]) -> BatchRecord | None:
        """Change the batch; where its state is another one meanwhile, return it unchanged."""
        changed = await self._store.change(self._id, self._owner, among, values)
        return changed if changed is not None else await self._ours()

    async def _give_up(self, errors: list[RowError]) -> BatchRecord | None:
        values = {"state": "failed", "errors": tuple(errors), "ended_at": self._clock.wall()}
        while True:
            try:
                return await self._change(values, OPEN)
            except StorageUnavailable:
                await asyncio.sleep(RETRY_S)

    # Validating

    async def _validate(self, record: BatchRecord) -> BatchRecord | None:
        try:
            plan = await self._read(record)
        except InvalidRows as invalid:
            return await self._give_up(list(invalid.errors))
        except Unavailable:
            raise
        except ForebayError as error:
            return await self._give_up([RowError(error.specific_code, error.message)])
        now = self._clock.wall()
        values = {"state": "in_progress", "in_progress_at": now, "total": len(plan.rows), "rows": plan.rows}
        return await self._change(values, ("validating",))

    async def _read(self, record: BatchRecord) -> Plan:
        if self._plan is None:
            principal = self._principal_of(record.key)
            endpoint = Endpoint(record.endpoint)
            principal.check_endpoint(endpoint)
            content = await self._content(record.input_file)
            self._plan = await asyncio.to_thread(read, content, endpoint, depth=principal.tenant_spec.ceilings.depth)
        return self._plan

    async def _content(self, file: str) -> bytes:
        record = await self._files.file(file)
        parts: list[bytes] = []
        while (part := await self._files.part(file, len(parts))) is not None:
            parts.append(part)
        content = b"".join(parts)
        if record is None or len(content) != record.size:  # perhaps just now
            raise InvalidRows([RowError("input_file_not_found", f"the file {file!r} was deleted")])
        return content

    # In progress

    async def _begin(self, record: BatchRecord) -> BatchRecord | None:
        """Submit the run, or find that it was; what is submitted is the same every time."""
        assert record.in_progress_at is not None
        try:
            plan = await self._read(record)
            workflow = Workflow(
                calls=plan.calls,
                outputs=tuple(plan.rows),
                objective="throughput",
                deadline_s=min(max(1.0, record.expires_at - record.in_progress_at), LONGEST_WINDOW_S),
                app=record.id,
            )
            run = await self._runs.submit(
                self._principal_of(record.key), workflow, end_user=record.end_user, idempotency=f"batch:{record.id}"
            )
        except InvalidRows as invalid:
            return await self._give_up(list(invalid.errors))
        except Unavailable:
            raise
        except ForebayError as error:
            return await self._give_up([RowError(error.specific_code, error.message)])
        self._plan = None
        return await self._change({"run": run.id}, _UNDER_WAY)

    async def _watch(self, record: BatchRecord) -> BatchRecord | None:
        """See what has come of the rows since; when all have their outcome, what is left is to write them down."""
        tally = self._tally = self._tally or Tally(await self._store.rows(record.id))
        progress = await self._store.progress(record.id, tally.number, _PAGE)
        if progress is None or progress.batch.owner != self._owner:
            return None
        for event in progress.events:
            tally.add(event)
        if tally.settled >= record.total:
            values = {"state": "finalizing", "finalizing_at": self._clock.wall(), **tally.counts}
            return await self._change(values, _UNDER_WAY)
        if not progress.has_run:
            return await self._give_up([_FORGOTTEN])
        if progress.batch.state == "cancelling" and record.run is not None:
            await self._cancel(progress.batch, record.run)
        return await self._wait(progress, tally)

    async def _wait(self, progress: Progress, tally: Tally) -> BatchRecord | None:
        if len(progress.events) == _PAGE:
            return progress.batch  # there is more
        record: BatchRecord | None = progress.batch
        if progress.events:
            self._pause_s = _LEAST_PAUSE_S
        else:
            if (progress.batch.completed, progress.batch.failed) != (tally.completed, tally.failed):
                record = await self._change(tally.counts, _UNDER_WAY)  # for who asks another gateway
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        await self._pause(self._pause_s)
        return record

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            return
        self._woken.clear()

    async def _cancel(self, record: BatchRecord, run: str) -> None:
        try:
            principal = self._principal_of(record.key)
            found = await self._runs.find(principal, run)
            told = found.told if isinstance(found, LiveRun) else found[1]
            if told.state == "running":
                await self._runs.ask(principal, run, lambda live: live.cancel(()))
                self._pause_s = _LEAST_PAUSE_S
        except ForebayError as error:  # a key that holds no longer: then no call of it will be made either
            _log.info("batch_not_cancelled_yet", batch=record.id, error=str(error))

    # Finalizing

    async def _finalize(self, record: BatchRecord) -> BatchRecord | None:
        rows = await self._store.rows(record.id)
        tally = Tally(rows)
        sheets = output, errors = self._sheet(record, "output"), self._sheet(record, "errors")
        while (progress := await self._store.progress(record.id, tally.number, _PAGE)) and progress.events:
            for event in progress.events:
                if (settled := tally.add(event)) is not None:
                    is_done = settled.outcome.state is State.DONE
                    await (output if is_done else errors).write(line_of(record, rows, settled))
        if tally.settled < record.total:
            return await self._give_up([_FORGOTTEN])
        for sheet in sheets:
            await sheet.close()
        is_cancelled = record.cancelling_at is not None or tally.has_cancelled
        state: BatchState = "cancelled" if is_cancelled else "expired" if tally.has_expired else "completed"
        values = {
            "state": state, "ended_at": self._clock.wall(), "output_file": output.id, "error_file": errors.id,
            **tally.counts,
        }  # fmt: skip
        sizes = {sheet.id: sheet.size for sheet in sheets if sheet.id is not None}
        return await self._store.finish(record.id, self._owner, values, sizes)

    def _sheet(self, record: BatchRecord, kind: str) -> Sheet:
        number = hashlib.sha256(f"{record.id}/{kind}".encode()).hexdigest()[:32]
        return Sheet(
            self._files,
            FileRecord(
                id=f"file-{number}", tenant=record.tenant, name=f"{record.id}_{kind}.jsonl", purpose="batch_output",
                size=0, created_at=self._clock.wall(), end_user=record.end_user,
            ),
        )  # fmt: skip
