"""A rig for gateways on the loopback interface: one core for the gateway, one for its load and its upstream."""
