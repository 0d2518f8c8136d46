"""Reports about a run: result files, plots, the HTML page."""
