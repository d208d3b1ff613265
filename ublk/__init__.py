"""Kernel side: ublk devices."""
