"""The tables of the first version."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0001"
down_revision = None


def upgrade(op: Operations) -> None:
    """Make all of them."""
    json = sa.JSON(none_as_null=True)
    meta = op.create_table(
        "meta",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(meta, [{"name": "tenants", "number": 1}, {"name": "revisions", "number": 1}])
    op.create_table(
        "tenants",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("is_suspended", sa.Boolean, nullable=False),
        sa.Column("max_class", sa.Text, nullable=False),
        sa.Column("models", json),
        sa.Column("endpoints", json),
        sa.Column("rate", json, nullable=False),
        sa.Column("budgets", json, nullable=False),
        sa.Column("end_user", json, nullable=False),
        sa.Column("end_user_budgets", json, nullable=False),
        sa.Column("ceilings", json, nullable=False),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False, index=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("prefix", sa.Text, nullable=False),
        sa.Column("role", sa.Text),
        sa.Column("models", json),
        sa.Column("endpoints", json),
        sa.Column("rate", json, nullable=False),
        sa.Column("budgets", json, nullable=False),
        sa.Column("max_class", sa.Text, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("revoked_at", sa.Double),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_table(
        "ledger",
        sa.Column("day", sa.Integer, primary_key=True),
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("end_user", sa.Text, primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("errors", sa.BigInteger, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "booked_batches",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("booked_at", sa.Double, nullable=False, index=True),
    )
    op.create_table(
        "requests",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("tenant", sa.Text),
        sa.Column("key", sa.Text),
        sa.Column("end_user", sa.Text),
        sa.Column("model", sa.Text),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("record", sa.LargeBinary, nullable=False),
    )
    op.create_index("ix_requests_id", "requests", ["id"])
    op.create_index("ix_requests_time", "requests", ["time"])
    op.create_table(
        "audit",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("outcome", sa.Integer, nullable=False),
        sa.Column("detail", json, nullable=False),
    )
    op.create_index("ix_audit_time", "audit", ["time", "id"])
    op.create_table(
        "revisions",
        sa.Column("resource", sa.Text, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("overlay", json, nullable=False),
        sa.Column("author", sa.Text, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("expires_at", sa.Double),
    )
