"""Background responses: each is a durable run of one call, which may wait for what others come to."""
