"""Tenants, keys, the ledger, the request log, audit and revisions in SQLite or PostgreSQL.

Every repository is a few methods over ``Database``. Each method is one transaction unless it says otherwise; it raises
``StorageUnavailable`` (an ``OSError``) when the database is away or slow: no call outlasts the database's timeout.
"""
