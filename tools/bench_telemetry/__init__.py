"""`make bench-telemetry`: what telemetry costs, and what it takes to lose a report."""
