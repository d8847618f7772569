"""The main job: check an engine against its golden, record goldens, accept what a failing run left."""
