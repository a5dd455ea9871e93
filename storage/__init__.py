"""ACTS on what outlives a process: the database, and counts that several gateways share."""
