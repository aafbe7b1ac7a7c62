"""Watching a run: metrics and their catalog, progress, status.json and `flowbp-ray status`, Grafana's dashboard."""
