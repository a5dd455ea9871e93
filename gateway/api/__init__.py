"""Routes of the data and the admin port."""
