"""Two traces, aligned on identical tokens, measured and judged. Knows no engine, no pytest and no file."""
