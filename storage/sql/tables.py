"""The tables as this version of the code knows them; ``migrations/`` leads every older database here.

Money is in picodollars, times are Unix seconds, days are counted from the epoch (UTC).
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    UniqueConstraint,
)

from storage.sql.types import Amount, Line, Prose, Small

METADATA = MetaData()
_JSON = JSON(none_as_null=True)

meta = Table(
    "meta",
    METADATA,
    Column("name", Line, primary_key=True),
    Column("number", Amount, nullable=False),
)
"""Counters that change with every write to what they name, so that others see at a glance whether to read again."""

tenants = Table(
    "tenants",
    METADATA,
    Column("id", Line, primary_key=True),
    Column("version", Small, nullable=False),
    Column("is_suspended", Boolean, nullable=False),
    Column("max_class", Line, nullable=False),
    Column("models", _JSON),
    Column("endpoints", _JSON),
    Column("rate", _JSON, nullable=False),
    Column("budgets", _JSON, nullable=False),
    Column("end_user", _JSON, nullable=False),
    Column("end_user_budgets", _JSON, nullable=False),
    Column("ceilings", _JSON, nullable=False),
    Column("weight", Double, nullable=False),
)

keys = Table(
    "keys",
    METADATA,
    Column("id", Line, primary_key=True),
    Column("version", Small, nullable=False),
    Column("tenant", Line, nullable=False, index=True),
    Column("name", Line, nullable=False),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("prefix", Line, nullable=False),
    Column("role", Line),
    Column("models", _JSON),
    Column("endpoints", _JSON),
    Column("rate", _JSON, nullable=False),
    Column("budgets", _JSON, nullable=False),
    Column("max_class", Line, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("created_at", Double, nullable=False),
)
"""``tenant`` refers to no row: tenants are also declared in the settings file."""

ledger = Table(
    "ledger",
    METADATA,
    Column("day", Small, primary_key=True),
    Column("tenant", Line, primary_key=True),
    Column("key", Line, primary_key=True),
    Column("end_user", Line, primary_key=True),
    Column("model", Line, primary_key=True),
    Column("requests", Amount, nullable=False),
    Column("errors", Amount, nullable=False),
    Column("input_tokens", Amount, nullable=False),
    Column("output_tokens", Amount, nullable=False),
    Column("cached_tokens", Amount, nullable=False),
    Column("cost", Amount, nullable=False),
)

booked_batches = Table(
    "booked_batches",
    METADATA,
    Column("id", Line, primary_key=True),
    Column("booked_at", Double, nullable=False, index=True),
)
"""Ids of batches that the ledger holds, for as long as one may be sent again."""

requests = Table(
    "requests",
    METADATA,
    Column(
        "number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True
    ),  # ids are clients' own: not unique
    Column("id", Line, nullable=False),
    Column("time", Double, nullable=False),
    Column("tenant", Line),
    Column("key", Line),
    Column("end_user", Line),
    Column("model", Line),
    Column("status", Small, nullable=False),
    Column("error", Line),
    Column("record", LargeBinary, nullable=False),
    Index("ix_requests_id", "id"),
    Index("ix_requests_time", "time"),
    Index("ix_requests_tenant", "tenant", "time"),
)
"""What is searched by has a column; ``record`` is all of it, as JSON: a column each would cost ten times the CPU."""

audit = Table(
    "audit",
    METADATA,
    Column("id", Line, primary_key=True),
    Column("time", Double, nullable=False),
    Column("actor", Line, nullable=False),
    Column("role", Line, nullable=False),
    Column("action", Line, nullable=False),
    Column("target", Prose, nullable=False),
    Column("outcome", Small, nullable=False),
    Column("detail", _JSON, nullable=False),
    Index("ix_audit_time", "time", "id"),
)

revisions = Table(
    "revisions",
    METADATA,
    Column("resource", Line, primary_key=True),
    Column("number", Small, primary_key=True),
    Column("overlay", _JSON, nullable=False),
    Column("author", Line, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("note", Prose, nullable=False),
    Column("state", Line, nullable=False),
    Column("expires_at", Double),
)

runs = Table(
    "runs",
    METADATA,
    Column("id", Line, primary_key=True),
    Column("tenant", Line, nullable=False),
    Column("key", Line, nullable=False),
    Column("graph", LargeBinary, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("state", Line, nullable=False),
    Column("end_user", Line),
    Column("app", Line),
    Column("idempotency", Line),
    Column("digest", Line, nullable=False),
    Column("owner", Line, nullable=False),
    Column("leased_until", Double, nullable=False),
    UniqueConstraint("tenant", "idempotency", name="uq_runs_idempotency"),
    Index("ix_runs_tenant", "tenant", "created_at"),
    Index("ix_runs_state", "state", "updated_at"),
)
"""Runs of workflows."""

run_events = Table(
    "run_events",
    METADATA,
    Column("run", Line, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("body", LargeBinary, nullable=False),
)
"""What has happened to them, in order; it goes with its run."""

run_letters = Table(
    "run_letters",
    METADATA,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("run", Line, ForeignKey("runs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("body", LargeBinary, nullable=False),
    Column("answer", LargeBinary),
    sqlite_autoincrement=True,
)
"""What other gateways ask of the one that has a run. Who has sent a letter takes it away, with its answer."""

files = Table(
    "files",
    METADATA,
    Column("id", Line, primary_key=True),
    Column("tenant", Line, nullable=False),
    Column("name", Line, nullable=False),
    Column("purpose", Line, nullable=False),
    Column("size", Amount, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("end_user", Line),
    Column("is_whole", Boolean, nullable=False),
    Index("ix_files_tenant", "tenant", "created_at"),
    Index("ix_files_created_at", "created_at"),
)
"""What tenants upload, and what comes of batches; nobody is shown one that is not whole yet."""

file_parts = Table(
    "file_parts",
    METADATA,
    Column("file", Line, ForeignKey("files.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("body", LargeBinary, nullable=False),
)
"""The bytes of files, piece by piece; they go with their file."""

batches = Table(
    "batches",
    METADATA,
    Column("id", Line, primary_key=True),
    Column("tenant", Line, nullable=False),
    Column("key", Line, nullable=False),
    Column("input_file", Line, nullable=False),
    Column("endpoint", Line, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("end_user", Line),
    Column("metadata", _JSON, nullable=False),
    Column("state", Line, nullable=False),
    Column("errors", _JSON, nullable=False),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("run", Line),
    Column("output_file", Line),
    Column("error_file", Line),
    Column("in_progress_at", Double),
    Column("finalizing_at", Double),
    Column("cancelling_at", Double),
    Column("ended_at", Double),
    Column("owner", Line, nullable=False),
    Column("leased_until", Double, nullable=False),
    Column("rows", LargeBinary),
    Column("idempotency", Line),
    Index("ix_batches_tenant", "tenant", "created_at"),
    Index("uq_batches_idempotency", "tenant", "idempotency", unique=True),
    Index("ix_batches_state", "state", "ended_at"),
)
"""Batches of requests. ``rows``: what the results have to know of each, as JSON, by the call that it is in the run.
Files and the run are named, and not referred to: each is forgotten in its own time."""
