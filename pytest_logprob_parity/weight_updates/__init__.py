"""Weight updates in flight: what may be loaded, how an engine takes it while requests run, and what it really did."""
