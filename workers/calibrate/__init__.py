"""Measuring this machine: its exchange, its experts, what live steps say of both."""
