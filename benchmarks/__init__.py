"""Measurements that back what Forebay claims; each module is one script, run as `make bench NAME=<module>`."""
