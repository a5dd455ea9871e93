"""Forget a person or a customer: what was asked goes, what has to be paid stays, under nobody's name."""

from sqlalchemy import delete, func, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from storage.sql.batches import Batches
from storage.sql.database import Database
from storage.sql.files import Files
from storage.sql.ledger import AMOUNTS, DIMENSIONS, added
from storage.sql.paging import MAX_PAGE
from storage.sql.tables import ledger, requests, runs


async def erase(database: Database, tenant: str, end_user: str | None = None, *, chunk: int = MAX_PAGE) -> int:
    """Delete the request records of a tenant, or of one of its end users, and return how many there were; and its
    runs, batches and files.

    The ledger keeps the amounts, added to the lines without an end user. The ledger is one transaction, records go in
    chunks: after an error, do it again. In SQLite the bytes are overwritten; PostgreSQL keeps them until it vacuums.
    """
    named = [ledger.c.tenant == tenant, ledger.c.end_user == end_user if end_user else ledger.c.end_user != ""]
    nameless = [literal("").label(name) if name == "end_user" else ledger.c[name] for name in DIMENSIONS]
    groups = [ledger.c[name] for name in DIMENSIONS if name != "end_user"]
    sums = select(*nameless, *(func.sum(ledger.c[name]) for name in AMOUNTS)).where(*named).group_by(*groups)
    add = database.insert(ledger).from_select([*DIMENSIONS, *AMOUNTS], sums)
    add = add.on_conflict_do_update(
        index_elements=list(DIMENSIONS), set_={name: added(ledger.c[name], add.excluded[name]) for name in AMOUNTS}
    )

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(add)
        await connection.execute(delete(ledger).where(*named))

    await database.write(work)
    theirs = select(requests.c.number).where(requests.c.tenant == tenant)
    if end_user:
        theirs = theirs.where(requests.c.end_user == end_user)
    num_deleted = await database.delete_in_chunks(requests, theirs, chunk)
    await Batches(database).erase(tenant, end_user, chunk=chunk)  # before the runs: nobody begins another for one
    await Files(database).erase(tenant, end_user)
    their_runs = select(runs.c.id).where(runs.c.tenant == tenant)
    if end_user:
        their_runs = their_runs.where(runs.c.end_user == end_user)
    await database.delete_in_chunks(runs, their_runs, chunk)
    await database.overwrite()
    return num_deleted
