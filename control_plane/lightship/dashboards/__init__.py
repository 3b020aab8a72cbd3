"""Dashboards: rules for Prometheus, a route for Alertmanager and dashboards for Grafana, as files that users copy."""
