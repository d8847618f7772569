"""The report of a run: results.json, and the page, the Markdown and the annotations that are rendered from it."""
