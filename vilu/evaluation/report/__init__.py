"""The report on an evaluation: tables (JSON and CSV), figures and one HTML file."""
