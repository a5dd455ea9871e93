"""Requests are found by their error, and those of one tenant without looking at the others'."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0002"
down_revision = "0001"


def upgrade(op: Operations) -> None:
    """Add the column and the index; of rows that are there the error stands in the record alone."""
    op.add_column("requests", sa.Column("error", sa.Text))
    op.create_index("ix_requests_tenant", "requests", ["tenant", "time"])
