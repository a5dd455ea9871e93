"""A batch that is submitted again under the same key is the same batch."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0007"
down_revision = "0006"


def upgrade(op: Operations) -> None:
    """Add the key."""
    op.add_column("batches", sa.Column("idempotency", sa.Text))
    op.create_index("uq_batches_idempotency", "batches", ["tenant", "idempotency"], unique=True)
