"""An evaluation as tables, figures and one HTML file."""
