"""What a deployment is made from; nothing of it is part of the server."""
