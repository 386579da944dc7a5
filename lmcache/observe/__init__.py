"""What an operator sees: metrics, log lines, recorded traces."""
