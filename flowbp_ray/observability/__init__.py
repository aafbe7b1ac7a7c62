"""A run seen from outside: its numbers' meaning, status.json, the table of `flowbp-ray status`, Grafana's dashboard."""
