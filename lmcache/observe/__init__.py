"""Observability: metrics, log lines, and recorded request traces."""
