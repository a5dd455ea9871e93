"""Numbers that tell, in one small read, whether anything of a kind has changed."""

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from storage.sql.database import Database
from storage.sql.tables import meta


async def counter(connection: AsyncConnection, name: str) -> int:
    """Return a counter's value; 0 if nobody has made it."""
    return int(await connection.scalar(select(meta.c.number).where(meta.c.name == name)) or 0)


async def poll(database: Database, name: str) -> int:
    """Return a counter's value over the connection that is kept for it: for whoever asks again and again."""
    rows = await database.poll("SELECT name, number FROM meta")
    return next((int(number) for found, number in rows if found == name), 0)


async def bump(connection: AsyncConnection, name: str) -> None:
    """Count a change. Others that count the same wait until the transaction ends: changes of a kind come one by one."""
    await connection.execute(update(meta).where(meta.c.name == name).values(number=meta.c.number + 1))
