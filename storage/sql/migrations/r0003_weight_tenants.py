"""Tenants have weights."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0003"
down_revision = "0002"


def upgrade(op: Operations) -> None:
    """Add the column; tenants that are there have equal shares."""
    op.add_column("tenants", sa.Column("weight", sa.Double, nullable=False, server_default="1"))
